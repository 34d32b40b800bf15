"""Savings, rent, stalls, and things that are counted and packed."""

from coe_megatron.corpus.templates.arithmetic import Problem, calc, dollars
from coe_megatron.corpus.templates.words import BEADED, FRUIT, SMALL_THINGS, Draw, nouns


def saving_for_a_goal(d: Draw) -> Problem:
    who, thing = (
        d.person(),
        d.choice(nouns("bicycle, guitar, camera, telescope, tent, skateboard, game console, kayak")),
    )
    earn, spend, weeks, has = d.number(15, 50), d.number(2, 12), d.number(3, 14), d.number(10, 90)
    price = has + (earn - spend) * weeks
    missing, saved = calc(f"{price} - {has}"), calc(f"{earn} - {spend}")
    time = calc(f"{missing} / {saved}")
    question = d.choice(
        (
            f"{who} wants {thing.a} that costs ${price} and has ${has} already. {who.He} earns ${earn} a week and "
            f"spends ${spend} of it. After how many weeks can {who.he} buy the {thing.one}?",
            f"The {thing.one} {who} dreams of costs ${price}. {who.He} owns ${has}, and from the ${earn} {who.he} gets "
            f"every week {who.he} spends ${spend}. How many weeks must {who.he} save?",
        )
    )
    return Problem(
        question,
        f"{who} still needs {missing.eq} dollars. Every week {who.he} saves {saved.eq} dollars. "
        f"It takes {time.eq} weeks.",
        time,
    )


def coins_in_a_jar(d: Draw) -> Problem:
    who, quarters, dimes, nickels = d.person(), d.number(4, 40), d.number(4, 50), d.number(4, 60)
    place = d.choice(("a jar", "a piggy bank", "an old tin", "a drawer", "a coat pocket"))
    a, b, c = calc(f"{quarters} * 25"), calc(f"{dimes} * 10"), calc(f"{nickels} * 5")
    cents = calc(f"{a} + {b} + {c}")
    total = calc(f"{cents} / 100")
    question = d.choice(
        (
            f"{who} finds {quarters} quarters, {dimes} dimes and {nickels} nickels in {place}. "
            f"How many dollars is that?",
            f"In {place} there are {nickels} nickels, {dimes} dimes and {quarters} quarters. How many dollars does "
            f"{who} count?",
        )
    )
    return Problem(
        question,
        f"The quarters are worth {a.eq} cents, the dimes {b.eq} cents and the nickels {c.eq} cents. "
        f"That makes {cents.eq} cents. In dollars it is {total.eq}.",
        total,
    )


def rent_among_roommates(d: Draw) -> Problem:
    mates, share = d.number(2, 6), d.number(150, 600)
    power, net = d.number(30, 120, 5), d.number(20, 60, 5)
    who, rent = d.person(), mates * share - power - net
    bills = calc(f"{power} + {net}")
    total = calc(f"{rent} + {bills}")
    each = calc(f"{total} / {mates}")
    year = calc(f"{each} * 12")
    question = d.choice(
        (
            f"{who} shares a flat; {mates} people live in it. Every month they pay ${rent} in rent, ${power} for "
            f"electricity and ${net} for the internet, in equal shares. How much does {who} pay in a year?",
            f"A flat costs ${rent} a month, and electricity and internet cost ${power} and ${net} more. The {mates} "
            f"people who live there split everything evenly. How much does each of them pay in twelve months?",
        )
    )
    return Problem(
        question,
        f"The bills come to {bills.eq} dollars. With the rent that is {total.eq} dollars a month. "
        f"Each pays {each.eq} dollars a month. In a year that is {year.eq} dollars.",
        year,
    )


def profit_of_a_stall(d: Draw) -> Problem:
    who, thing = d.person(), d.choice(BEADED)
    made, cost = d.number(16, 60), d.number(2, 8)
    gain, fee = d.number(5, 15), d.number(5, 25)
    sold, price = made - d.number(0, 3), cost + gain
    spent, took = calc(f"{made} * {cost}"), calc(f"{sold} * {price}")
    outlay = calc(f"{spent} + {fee}")
    profit = calc(f"{took} - {outlay}")
    question = d.choice(
        (
            f"It costs {who} ${cost} to make one of {who.his} {thing}. {who.He} makes {made}, pays {dollars(fee)} for "
            f"a stall and sells {sold} of them at ${price} each. How many dollars is the profit?",
            f"At a fair {who} sells {thing.of(sold)} for ${price} each. The stall costs {dollars(fee)}, and the "
            f"material was ${cost} for each of the {made} {who.he} made. What is {who.his} profit in dollars?",
        )
    )
    return Problem(
        question,
        f"The material costs {spent.eq} dollars, and with the stall {outlay.eq} dollars. The sales bring {took.eq} "
        f"dollars. The profit is {profit.eq} dollars.",
        profit,
    )


def boxes_given_away(d: Draw) -> Problem:
    (one, two), thing = d.people(2), d.choice(SMALL_THINGS)
    size, boxes = d.number(5, 24), d.number(4, 14)
    given, extra = d.number(2, boxes - 2), d.number(3, 40)
    count = size * boxes
    filled = calc(f"{count} / {size}")
    kept = calc(f"{filled} - {given}")
    rest = calc(f"{kept} * {size}")
    total = calc(f"{rest} + {extra}")
    question = d.choice(
        (
            f"{one} packs {thing.of(count)} into boxes of {size}. {one.He} gives {given} boxes to {two} and then buys "
            f"{extra} more {thing}. How many {thing} does {one} have now?",
            f"{one} sorts {thing.of(count)} into boxes that hold {size} each. After giving {given} full boxes to "
            f"{two}, {one.he} finds another {extra}. How many {thing} does {one} own then?",
        )
    )
    return Problem(
        question,
        f"{one} fills {filled.eq} boxes and keeps {kept.eq} of them. They hold {rest.eq} {thing}. "
        f"With the new ones {one.he} has {total.eq} {thing}.",
        total,
    )


def legs_on_a_farm(d: Draw) -> Problem:
    fowl, cattle = d.choice(nouns("chicken, duck, turkey, goose/geese")), d.choice(nouns("cow, goat, pig, sheep/sheep"))
    birds, more, sold = d.number(6, 30), d.number(2, 20), d.number(2, 5)
    animals = calc(f"{birds} + {more}")
    left = calc(f"{animals} - {sold}")
    two, four = calc(f"{birds} * 2"), calc(f"{left} * 4")
    legs = calc(f"{two} + {four}")
    question = d.choice(
        (
            f"A farmer has {fowl.of(birds)} and {more} more {cattle} than {fowl}. {sold} {cattle} are sold. "
            f"How many legs do the animals that remain have?",
            f"On a farm live {fowl.of(birds)}. There were {more} more {cattle} than {fowl}, but {sold} {cattle} have "
            f"been sold. How many legs do all these animals have now?",
        )
    )
    return Problem(
        question,
        f"There were {animals.eq} {cattle}, and {left.eq} remain. The {fowl} have {two.eq} legs and the {cattle} have "
        f"{four.eq} legs. In total there are {legs.eq} legs.",
        legs,
    )


def eggs_by_the_dozen(d: Draw) -> Problem:
    who, hens, days, price = d.person(), d.number(2, 8) * 6, d.choice((6, 8, 10, 12)), d.number(2, 6)
    eaten = d.number(1, 4) * 12
    laid = calc(f"{hens} * {days}")
    sold = calc(f"{laid} - {eaten}")
    dozens = calc(f"{sold} / 12")
    money = calc(f"{dozens} * {price}")
    question = d.choice(
        (
            f"Each of {who}'s {hens} hens lays one egg a day. In {days} days {who} keeps {eaten} eggs and sells all "
            f"the others at ${price} a dozen. How much money does {who.he} make?",
            f"{who} keeps {hens} hens that lay an egg every day. After {days} days {who.he} puts {eaten} eggs aside "
            f"and sells the rest by the dozen for ${price}. How many dollars does {who.he} get?",
        )
    )
    return Problem(
        question,
        f"The hens lay {laid.eq} eggs. {who} sells {sold.eq} eggs, which is {dozens.eq} dozen. "
        f"They bring {money.eq} dollars.",
        money,
    )


def seats_in_a_hall(d: Draw) -> Problem:
    rows, seats, empty, price = d.number(8, 30), d.number(10, 30), d.number(5, 60), d.number(4, 15)
    event = d.choice(("concert", "play", "lecture", "film night", "magic show", "puppet show"))
    whole = calc(f"{rows} * {seats}")
    taken = calc(f"{whole} - {empty}")
    money = calc(f"{taken} * {price}")
    question = d.choice(
        (
            f"A hall has {rows} rows of {seats} seats. At a {event} all but {empty} seats are taken, and a ticket "
            f"costs ${price}. How much money do the tickets bring in?",
            f"For a {event}, tickets at ${price} are sold for a hall with {rows} rows of {seats} seats. {empty} seats "
            f"stay empty. How many dollars are taken in?",
        )
    )
    return Problem(
        question,
        f"The hall has {whole.eq} seats. {taken.eq} of them are taken. The tickets bring in {money.eq} dollars.",
        money,
    )


def fruit_for_classes(d: Draw) -> Problem:
    fruit, classes, pupils = d.choice(FRUIT), d.number(2, 6), d.number(15, 30)
    crate, spare = d.number(10, 30, 5), d.number(3, 40)
    each = calc(f"{classes} * {pupils}")
    crates = (int(each) + spare) // crate + 1
    whole = calc(f"{crates} * {crate}")
    left = calc(f"{whole} - {each}")
    question = d.choice(
        (
            f"A school receives {crates} crates of {crate} {fruit}. Every child in its {classes} classes of {pupils} "
            f"children gets one. How many {fruit} are left over?",
            f"{crates} crates with {fruit.of(crate)} each are handed out to {classes} classes. Each class has {pupils} "
            f"children, and each child takes {fruit.a}. How many {fruit} remain?",
        )
    )
    return Problem(
        question,
        f"The crates hold {whole.eq} {fruit}. There are {each.eq} children. So {left.eq} {fruit} are left.",
        left,
    )


TEMPLATES = (
    saving_for_a_goal,
    coins_in_a_jar,
    rent_among_roommates,
    profit_of_a_stall,
    boxes_given_away,
    legs_on_a_farm,
    eggs_by_the_dozen,
    seats_in_a_hall,
    fruit_for_classes,
)
