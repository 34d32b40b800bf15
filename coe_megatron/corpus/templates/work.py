"""Work rates: machines, workers, printers, pools, harvests."""

from coe_megatron.corpus.templates.arithmetic import Problem, calc
from coe_megatron.corpus.templates.words import BAKED, BEADED, DAY, FRUIT, HOUR, RELATIVES, SCHOOL_GOODS, Draw


def machines_running(d: Draw) -> Problem:
    thing, machines, rate = d.choice(SCHOOL_GOODS + BAKED), d.number(2, 9), d.number(15, 90, 5)
    hours, bad = d.number(3, 9), d.number(5, 60)
    hourly = calc(f"{machines} * {rate}")
    made = calc(f"{hourly} * {hours}")
    good = calc(f"{made} - {bad}")
    question = d.choice(
        (
            f"A factory has {machines} machines, and each of them makes {rate} {thing} an hour. They run for {hours} "
            f"hours, and {bad} of the {thing} turn out faulty. How many good {thing} are there?",
            f"Each of {machines} machines turns out {thing.of(rate)} an hour. After a shift of {hours} hours, {bad} "
            f"{thing} are thrown away. How many {thing} remain?",
        )
    )
    return Problem(
        question,
        f"Together the machines make {hourly.eq} {thing} an hour. In {hours} hours they make {made.eq} {thing}. "
        f"Without the faulty ones, {good.eq} remain.",
        good,
    )


def workers_and_days(d: Draw) -> Problem:
    workers, days = d.number(4, 14, 2), d.number(3, 15)
    others = d.choice([n for n in range(2, 31) if workers * days % n == 0 and n != workers])
    job = d.choice(("paint a bridge", "lay a road", "build a barn", "renovate a school", "pave a square"))
    effort = calc(f"{workers} * {days}")
    needed = calc(f"{effort} / {others}")
    question = d.choice(
        (
            f"It takes {workers} workers {days} days to {job}. How many days would {others} workers need?",
            f"A crew of {workers} can {job} in {days} days. In how many days can a crew of {others} do it at the same "
            f"pace?",
        )
    )
    return Problem(
        question,
        f"The job takes {effort.eq} days of one worker's time. Shared among {others} workers, that is "
        f"{DAY.eq(needed)}.",
        needed,
    )


def two_printers(d: Draw) -> Problem:
    fast, slow, minutes, rest = d.number(12, 40), d.number(5, 20), d.number(5, 30), d.number(5, 25)
    pages = (fast + slow) * minutes
    what = d.choice(("exam papers", "flyers", "reports", "booklets", "song sheets"))
    rate = calc(f"{fast} + {slow}")
    time = calc(f"{pages} / {rate}")
    total = calc(f"{time} + {rest}")
    question = d.choice(
        (
            f"One printer prints {fast} pages a minute and another prints {slow}. Together they print {pages} pages of "
            f"{what}, and stapling takes {rest} more minutes. How many minutes does everything take?",
            f"Two printers share the {pages} pages of some {what}. They print {fast} and {slow} pages a minute. "
            f"Afterwards the sheets are sorted in {rest} minutes. After how many minutes is all done?",
        )
    )
    return Problem(
        question,
        f"Both printers together print {rate.eq} pages a minute. Printing takes {time.eq} minutes. "
        f"With the {rest} minutes afterwards, everything takes {total.eq} minutes.",
        total,
    )


def filling_a_leaky_pool(d: Draw) -> Problem:
    leak, net, hours = d.number(2, 15), d.number(20, 90, 5), d.number(3, 12)
    vessel = d.choice(("pool", "pond", "tank", "fountain", "reservoir"))
    rate, volume = net + leak, net * hours
    gain = calc(f"{rate} - {leak}")
    time = calc(f"{volume} / {gain}")
    question = d.choice(
        (
            f"A hose fills a {vessel} with {rate} liters an hour, but {leak} liters an hour leak out. "
            f"The {vessel} holds {volume} liters and is empty. How many hours does it take to fill it?",
            f"An empty {vessel} of {volume} liters has a crack that loses {leak} liters an hour. "
            f"Water runs in at {rate} liters an hour. After how many hours is the {vessel} full?",
        )
    )
    return Problem(
        question,
        f"Every hour the {vessel} gains {gain.eq} liters. Filling the {vessel} takes {time.eq} hours.",
        time,
    )


def harvest_in_baskets(d: Draw) -> Problem:
    (one, two), fruit, relative = d.people(2), d.choice(FRUIT), d.choice(RELATIVES)
    size, hours = d.number(10, 30, 5), d.number(2, 5)
    both = d.choice([r for r in range(20, 121) if r * hours % size == 0])
    faster = both * d.number(3, 7) // 10
    rate = calc(f"{faster} + {both - faster}")
    picked = calc(f"{rate} * {hours}")
    filled = calc(f"{picked} / {size}")
    question = d.choice(
        (
            f"{one} picks {faster} {fruit} an hour and {one.his} {relative} {two} picks {both - faster}. "
            f"A basket holds {size} {fruit}. How many baskets do they fill in {hours} hours?",
            f"In the orchard {one} gathers {fruit.of(faster)} an hour while {two} gathers {fruit.of(both - faster)}. "
            f"They work for {hours} hours and put {size} {fruit} into each basket. How many baskets do they need?",
        )
    )
    return Problem(
        question,
        f"Together they pick {rate.eq} {fruit} an hour. In {hours} hours they pick {picked.eq} {fruit}. "
        f"They fill {filled.eq} {'basket' if filled.value == 1 else 'baskets'}.",
        filled,
    )


def handmade_orders(d: Draw) -> Problem:
    who, thing = d.person(), d.choice(BEADED)
    minutes, done, hours = d.choice((10, 12, 15, 20, 30)), d.number(2, 12), d.number(2, 8)
    per_hour = calc(f"60 / {minutes}")
    made = calc(f"{per_hour} * {hours}")
    total = calc(f"{done} + {made}")
    question = d.choice(
        (
            f"{who} needs {minutes} minutes to make {thing.a}. {who.He} has already made {done}. "
            f"How many {thing} will {who.he} have after {hours} more hours of work?",
            f"It takes {who} {minutes} minutes to finish {thing.a}. With {done} of them ready, {who.he} works for "
            f"another {hours} hours. How many {thing} are there in the end?",
        )
    )
    return Problem(
        question,
        f"In an hour {who} makes {per_hour.eq} {thing}. In {hours} hours that is {made.eq} {thing}. "
        f"Altogether there are {total.eq} {thing}.",
        total,
    )


def typing_a_manuscript(d: Draw) -> Problem:
    who, speed = d.person(), d.choice((30, 40, 45, 50, 60, 75))
    hours = d.number(2, 6)
    per_page = d.choice([size for size in (150, 200, 240, 250, 300) if hours * 60 * speed % size == 0])
    minutes = calc(f"{hours} * 60")
    words = calc(f"{minutes} * {speed}")
    result = calc(f"{words} / {per_page}")
    what = d.choice(("a novel", "a travel diary", "a speech", "a report", "a pile of old letters"))
    question = (f"{who} types {what} at {speed} words a minute. A page holds {per_page} words. ") + d.choice(
        (
            f"How many pages does {who.he} type in {HOUR.of(hours)}?",
            f"How many pages are ready after {HOUR.of(hours)} of typing?",
        )
    )
    return Problem(
        question,
        f"{HOUR.of(hours).capitalize()} are {minutes.eq} minutes. In that time {who} types {words.eq} words. "
        f"They fill {result.eq} pages.",
        result,
    )


TEMPLATES = (
    machines_running,
    workers_and_days,
    two_printers,
    filling_a_leaky_pool,
    harvest_in_baskets,
    handmade_orders,
    typing_a_manuscript,
)
