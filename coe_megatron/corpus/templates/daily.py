"""Mixtures and recipes, timetables and practice."""

from coe_megatron.corpus.templates.arithmetic import Problem, calc
from coe_megatron.corpus.templates.words import BAKED, DAYS, Draw


def juice_in_parts(d: Draw) -> Problem:
    a, b = d.number(2, 7), d.number(1, 5)
    size, price = d.number(2, 12), d.number(2, 6)
    first, second = d.some(("orange juice", "apple juice", "mango juice", "ginger ale", "lemonade", "iced tea"), 2)
    liters = (a + b) * size
    parts = calc(f"{a} + {b}")
    one = calc(f"{liters} / {parts}")
    need = calc(f"{one} * {a}")
    cost = calc(f"{need} * {price}")
    ratio = f"{a} parts of {first} and {b} {'part' if b == 1 else 'parts'} of {second}"
    question = d.choice(
        (
            f"A drink is mixed from {ratio}. A liter of {first} costs ${price}. How much does the {first} in {liters} "
            f"liters of the drink cost?",
            f"For a party, {liters} liters of punch are made of {ratio}. What is the price of the {first} in it at "
            f"${price} a liter?",
        )
    )
    return Problem(
        question,
        f"There are {parts.eq} parts. One part is {one.eq} liters. That makes {need.eq} liters of {first}. "
        f"It costs {cost.eq} dollars.",
        cost,
    )


def price_of_a_blend(d: Draw) -> Problem:
    who = d.person()
    first, second = d.some(("almonds", "walnuts", "raisins", "cashews", "peanuts", "dried figs", "hazelnuts"), 2)
    n, m, mean = d.number(2, 6), d.number(2, 6), d.number(8, 16)
    shift = d.number(1, (mean - 2) // max(n, m))
    p, q = mean + m * shift, mean - n * shift
    one, two = calc(f"{n} * {p}"), calc(f"{m} * {q}")
    cost, weight = calc(f"{one} + {two}"), calc(f"{n} + {m}")
    price = calc(f"{cost} / {weight}")
    question = d.choice(
        (
            f"{who} mixes {n} kilograms of {first} at ${p} a kilogram with {m} kilograms of {second} at ${q} a "
            f"kilogram. What does a kilogram of the mixture cost?",
            f"A shop blends {m} kilograms of {second}, worth ${q} a kilogram, and {n} kilograms of {first}, worth "
            f"${p} a kilogram. How many dollars is one kilogram of the blend worth?",
        )
    )
    return Problem(
        question,
        f"The {first} cost {one.eq} dollars and the {second} {two.eq} dollars, together {cost.eq} dollars. "
        f"The mixture weighs {weight.eq} kilograms. A kilogram costs {price.eq} dollars.",
        price,
    )


def salt_in_solution(d: Draw) -> Problem:
    liters, more = d.number(30, 120, 10), d.number(30, 120, 10)
    weak, strong = d.some((5, 10, 15, 20, 25, 30, 40), 2)
    what = d.choice(("salt", "sugar", "vinegar", "cleaner", "fertilizer"))
    one, two = calc(f"{liters} * {weak} / 100"), calc(f"{more} * {strong} / 100")
    total, volume = calc(f"{one} + {two}"), calc(f"{liters} + {more}")
    water = calc(f"{volume} - {total}")
    question = (
        f"In a tank, {liters} liters of a liquid with {weak}% {what} are mixed with {more} liters of a liquid with "
        f"{strong}% {what}. The rest is water. "
    ) + d.choice(("How many liters of water are in the mixture?", f"How many liters of the mixture are not {what}?"))
    return Problem(
        question,
        f"The first liquid contains {one.eq} liters of {what} and the second {two.eq} liters. Together that is "
        f"{total.eq} liters of {what}. The mixture has {volume.eq} liters, so {water.eq} liters are water.",
        water,
    )


def recipe_for_more(d: Draw) -> Problem:
    who, treat = d.person(), d.choice(BAKED)
    base, times, grams = d.choice((4, 6, 8, 10, 12)), d.number(2, 6), d.number(60, 400, 20)
    bag = d.choice((500, 1000))
    wanted = base * times
    batches = calc(f"{wanted} / {base}")
    flour = calc(f"{batches} * {grams}")
    have = (int(flour) // bag + 1) * bag
    left = calc(f"{have} - {flour}")
    question = d.choice(
        (
            f"A recipe for {treat.of(base)} needs {grams} grams of flour. {who} has {have} grams of flour and bakes "
            f"{treat.of(wanted)}. How many grams of flour are left?",
            f"{who} uses {grams} grams of flour for {treat.of(base)}. Out of {have} grams, how many grams remain after "
            f"{who.he} has baked {treat.of(wanted)}?",
        )
    )
    return Problem(
        question,
        f"{who} makes the recipe {batches.eq} times. That takes {flour.eq} grams of flour. {left.eq} grams are left.",
        left,
    )


def practice_in_a_week(d: Draw) -> Problem:
    who, first = d.person(), d.number(15, 60, 5)
    more, weeks = d.number(10, 60, 5), d.number(2, 6)
    what = d.choice(("the piano", "the violin", "the drums", "juggling", "Spanish", "chess", "the flute", "archery"))
    weekend = calc(f"{first} + {more}")
    work, rest = calc(f"5 * {first}"), calc(f"2 * {weekend}")
    week = calc(f"{work} + {rest}")
    total = calc(f"{week} * {weeks}")
    question = d.choice(
        (
            f"{who} practices {what} for {first} minutes every day from Monday to Friday, and {more} minutes longer on "
            f"Saturday and on Sunday. How many minutes is that in {weeks} weeks?",
            f"On each of the five weekdays {who} spends {first} minutes on {what}, and on each day of the weekend "
            f"{more} minutes more. How many minutes does {who.he} practice in {weeks} weeks?",
        )
    )
    return Problem(
        question,
        f"On each day of the weekend {who} practices {weekend.eq} minutes. The weekdays make {work.eq} minutes and the "
        f"weekend {rest.eq} minutes. A week has {week.eq} minutes of practice. In {weeks} weeks that is {total.eq} "
        f"minutes.",
        total,
    )


def buses_in_a_day(d: Draw) -> Problem:
    start, hours = d.number(5, 9), d.number(8, 14)
    every, seats = d.choice((10, 12, 15, 20, 30)), d.number(8, 40)
    what = d.choice(("bus", "ferry", "tram", "cable car", "shuttle"))
    per_hour = calc(f"60 / {every}")
    trips = calc(f"{per_hour} * {hours}")
    people = calc(f"{trips} * {seats}")
    question = d.choice(
        (
            f"From {start} in the morning a {what} leaves every {every} minutes, for {hours} hours. On average it "
            f"carries {seats} passengers. How many passengers is that in a day?",
            f"A {what} runs {hours} hours a day and leaves every {every} minutes with {seats} people on board. "
            f"How many people does it carry each day?",
        )
    )
    return Problem(
        question,
        f"The {what} leaves {per_hour.eq} times an hour. In {hours} hours there are {trips.eq} trips. "
        f"They carry {people.eq} people.",
        people,
    )


def lessons_until_the_bell(d: Draw) -> Problem:
    lessons, length, pause, lunch = d.number(4, 7), d.number(35, 60, 5), d.number(5, 15, 5), d.number(20, 60, 5)
    day = d.choice(DAYS[:5])
    taught = calc(f"{lessons} * {length}")
    breaks = calc(f"{lessons} - 2")
    paused = calc(f"{breaks} * {pause}")
    total = calc(f"{taught} + {paused} + {lunch}")
    question = (
        f"On {day} a class has {lessons} lessons of {length} minutes. Between two lessons there is a break of {pause} "
        f"minutes, except once, when there is a lunch break of {lunch} minutes. "
    ) + d.choice(
        (
            "How many minutes pass from the first lesson's start to the last one's end?",
            f"How long is the class at school on {day}, in minutes?",
        )
    )
    return Problem(
        question,
        f"The lessons take {taught.eq} minutes. Besides lunch there are {breaks.eq} breaks, which take {paused.eq} "
        f"minutes. The whole time is {total.eq} minutes.",
        total,
    )


TEMPLATES = (
    juice_in_parts,
    price_of_a_blend,
    salt_in_solution,
    recipe_for_more,
    practice_in_a_week,
    buses_in_a_day,
    lessons_until_the_bell,
)
