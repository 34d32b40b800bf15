"""Geometry: fences, floors, walls, boxes."""

from coe_megatron.corpus.templates.arithmetic import Problem, calc
from coe_megatron.corpus.templates.words import Draw, nouns

METER, CAN = nouns("meter, can")


def fence_around_a_field(d: Draw) -> Problem:
    who, width, more, price = d.person(), d.number(5, 40), d.number(2, 25), d.number(3, 15)
    place = d.choice(("garden", "field", "playground", "meadow", "yard", "vineyard"))
    length = calc(f"{width} + {more}")
    around = calc(f"2 * ({width} + {length})")
    cost = calc(f"{around} * {price}")
    question = d.choice(
        (
            f"A rectangular {place} is {width} meters wide and {more} meters longer than wide. {who} puts a fence "
            f"around it that costs ${price} a meter. How much does the fence cost?",
            f"{who} fences in a rectangular {place}. Its width is {width} meters, and its length {more} meters more. "
            f"At ${price} for a meter of fence, how many dollars does {who.he} need?",
        )
    )
    return Problem(
        question,
        f"The {place} is {length.eq} meters long. The fence is {around.eq} meters long. It costs {cost.eq} dollars.",
        cost,
    )


def tiles_on_a_floor(d: Draw) -> Problem:
    room = d.choice(("kitchen", "bathroom", "hallway", "terrace", "laundry room"))
    side = d.choice((20, 25, 50))
    width, length, price = d.number(2, 8), d.number(2, 9), d.number(2, 6)
    across, along = calc(f"{width} * 100 / {side}"), calc(f"{length} * 100 / {side}")
    tiles = calc(f"{across} * {along}")
    cost = calc(f"{tiles} * {price}")
    question = d.choice(
        (
            f"The floor of a {room} is {width} meters by {length} meters. It is covered with square tiles of {side} "
            f"centimeters, and each tile costs ${price}. How much do the tiles cost?",
            f"Square tiles with a side of {side} centimeters are laid in a {room} of {width} by {length} meters. "
            f"A tile costs ${price}. What is the price of all the tiles in dollars?",
        )
    )
    return Problem(
        question,
        f"{across.eq} tiles fit across the {room} and {along.eq} tiles along it. That makes {tiles.eq} tiles. "
        f"They cost {cost.eq} dollars.",
        cost,
    )


def path_around_a_pond(d: Draw) -> Problem:
    width, length, border = d.number(4, 20), d.number(4, 25), d.number(1, 3)
    inside = d.choice(("pond", "lawn", "flower bed", "sandbox", "swimming pool"))
    inner = calc(f"{width} * {length}")
    wide, long = calc(f"{width} + 2 * {border}"), calc(f"{length} + 2 * {border}")
    outer = calc(f"{wide} * {long}")
    path = calc(f"{outer} - {inner}")
    question = d.choice(
        (
            f"A rectangular {inside} of {width} meters by {length} meters has a path of {METER.of(border)} all around "
            f"it. What is the area of the path in square meters?",
            f"Around a {inside} of {width} by {length} meters runs a paved path that is {METER.of(border)} wide. "
            f"How many square meters are paved?",
        )
    )
    return Problem(
        question,
        f"The {inside} covers {inner.eq} square meters. With the path, one side is {wide.eq} meters and the other "
        f"{long.eq} meters. That is {outer.eq} square meters. The path alone covers {path.eq} square meters.",
        path,
    )


def cubes_in_a_box(d: Draw) -> Problem:
    edge, a, b, c = d.number(2, 5), d.number(2, 9), d.number(2, 9), d.number(2, 6)
    used = d.number(1, a * b * c - 1)
    sizes = [edge * n for n in (a, b, c)]
    x, y, z = (calc(f"{size} / {edge}") for size in sizes)
    fit = calc(f"{x} * {y} * {z}")
    left = calc(f"{fit} - {used}")
    what = d.choice(("wooden cubes", "sugar cubes", "toy blocks", "dice", "magnetic cubes"))
    question = (
        f"A box measures {sizes[0]} by {sizes[1]} by {sizes[2]} centimeters inside. It is to be filled with {what} "
        f"whose edges are {edge} centimeters long. "
    ) + d.choice(
        (
            f"{used} of them {'is' if used == 1 else 'are'} already in the box. How many more fit in?",
            f"After {used} {'has' if used == 1 else 'have'} been put in, how many more does the box hold?",
        )
    )
    return Problem(
        question,
        f"Along the edges of the box fit {x.eq}, {y.eq} and {z.eq} cubes. The box holds {fit.eq} cubes. "
        f"So {left.eq} more {'fits' if left.value == 1 else 'fit'} in.",
        left,
    )


def painting_the_walls(d: Draw) -> Problem:
    who, price = d.person(), d.number(6, 18)
    length, width, height, cover = d.number(3, 8), d.number(3, 8), d.number(2, 4), d.number(3, 8)
    area = calc(f"2 * {height} * ({length} + {width})")
    glass = int(area) % cover + d.choice((0, cover) if int(area) % cover else (cover,))
    bare = calc(f"{area} - {glass}")
    need = calc(f"{bare} / {cover}")
    cost = calc(f"{need} * {price}")
    question = d.choice(
        (
            f"A room is {length} meters long, {width} meters wide and {height} meters high. Doors and windows take up "
            f"{glass} square meters of its four walls. {who} paints the rest. One can of paint covers {cover} square "
            f"meters and costs ${price}. How much does {who.he} spend on paint?",
            f"{who} paints the four walls of a room of {length} by {width} meters that is {height} meters high, except "
            f"for {glass} square meters of doors and windows. A can of paint costs ${price} and is enough for {cover} "
            f"square meters. How many dollars does the paint cost?",
        )
    )
    return Problem(
        question,
        f"The four walls have {area.eq} square meters. Without doors and windows, {bare.eq} square meters remain. "
        f"{who} needs {need.eq} {CAN.one if need.value == 1 else CAN.many} of paint. The price is {cost.eq} dollars.",
        cost,
    )


def wire_bent_again(d: Draw) -> Problem:
    side = d.number(5, 30)
    shift = d.number(1, side - 2)
    length, width = side + shift, side - shift
    what = d.choice(("wire", "rope", "strip of metal", "ribbon", "string of lights"))
    around = calc(f"2 * ({length} + {width})")
    edge = calc(f"{around} / 4")
    area = calc(f"{edge} * {edge}")
    question = d.choice(
        (
            f"A {what} forms a rectangle of {length} by {width} centimeters. The same {what} is laid out as a square. "
            f"What is the area of the square in square centimeters?",
            f"A square has the same perimeter as a rectangle that a {what} makes with sides of {length} and {width} "
            f"centimeters. How many square centimeters does the square cover?",
        )
    )
    return Problem(
        question,
        f"The {what} is {around.eq} centimeters long. Each side of the square has {edge.eq} centimeters. "
        f"Its area is {area.eq} square centimeters.",
        area,
    )


def water_in_an_aquarium(d: Draw) -> Problem:
    length, width, height = d.number(30, 100, 10), d.number(20, 60, 10), d.number(30, 60, 10)
    gap = d.number(5, 10, 5)
    vessel = d.choice(nouns("aquarium, tank, trough, basin"))
    depth = calc(f"{height} - {gap}")
    volume = calc(f"{length} * {width} * {depth}")
    liters = calc(f"{volume} / 1000")
    question = (
        f"{vessel.a.capitalize()} is {length} centimeters long, {width} centimeters wide and {height} centimeters "
        f"high. The water ends {gap} centimeters below the top. "
    ) + d.choice(
        (
            f"How many liters of water are in the {vessel.one}?",
            "How many liters of water does it contain?",
        )
    )
    return Problem(
        question,
        f"The water is {depth.eq} centimeters deep. Its volume is {volume.eq} cubic centimeters. A liter has 1000 "
        f"cubic centimeters, so there are {liters.eq} liters.",
        liters,
    )


TEMPLATES = (
    fence_around_a_field,
    tiles_on_a_floor,
    path_around_a_pond,
    cubes_in_a_box,
    painting_the_walls,
    wire_bent_again,
    water_in_an_aquarium,
)
