"""Ages and comparisons between people."""

from coe_megatron.corpus.templates.arithmetic import Problem, calc
from coe_megatron.corpus.templates.words import POINT, RELATIVES, SCHOOL_GOODS, SMALL_THINGS, YEAR, Draw, times


def ages_in_sum(d: Draw) -> Problem:
    one, two, three = d.people(3)
    age, ratio, gap = d.number(4, 15), d.number(2, 4), d.number(2, 9)
    second = calc(f"{age} * {ratio}")
    third = calc(f"{second} + {gap}")
    total = calc(f"{age} + {second} + {third}")
    question = d.choice(
        (
            f"{one} is {YEAR.of(age)} old. {two} is {times(ratio)} as old as {one}, and {three} is {gap} years older "
            f"than {two}. What is the sum of their ages?",
            f"{three} is {gap} years older than {two}, who is {times(ratio)} as old as {one}. {one} is {age}. "
            f"How old are the three of them together?",
        )
    )
    return Problem(
        question,
        f"{two} is {second.eq} years old. {three} is {third.eq} years old. Together they are {total.eq} years old.",
        total,
    )


def age_years_from_now(d: Draw) -> Problem:
    one, relation = d.person(), d.choice(("aunt", "teacher", "uncle", "neighbor", "coach", "doctor"))
    young, ratio, years = d.number(7, 12), d.number(4, 6), d.number(2, 15)
    old = calc(f"{young} * {ratio}")
    later, later_old = calc(f"{young} + {years}"), calc(f"{old} + {years}")
    total = calc(f"{later} + {later_old}")
    question = d.choice(
        (
            f"{one} is {young} years old, and {one.his} {relation} is {times(ratio)} that age. What will be the sum of "
            f"their ages in {years} years?",
            f"The {relation} of {one} is {times(ratio)} as old as {one}, who is {young}. Together, how old will they "
            f"be {years} years from now?",
        )
    )
    return Problem(
        question,
        f"The {relation} is {old.eq} years old. In {years} years {one} will be {later.eq} and the {relation} "
        f"{later_old.eq} years old. The sum is {total.eq}.",
        total,
    )


def age_years_ago(d: Draw) -> Problem:
    one, two = d.people(2)
    then, ratio, ago = d.number(3, 12), d.number(2, 4), d.number(2, 9)
    now, before = then + ago, calc(f"{then + ago} - {ago}")
    other_before = calc(f"{before} * {ratio}")
    other = calc(f"{other_before} + {ago}")
    question = d.choice(
        (
            f"{one} is {now} years old today. {ago} years ago, {two} was {times(ratio)} as old as {one} was then. "
            f"How old is {two} now?",
            f"{ago} years ago {two} was {times(ratio)} as old as {one}. {one} is {now} now. What is {two}'s age today?",
        )
    )
    return Problem(
        question,
        f"{ago} years ago {one} was {before.eq} years old. At that time {two} was {other_before.eq} years old. "
        f"Today {two} is {other.eq} years old.",
        other,
    )


def years_until_twice_as_old(d: Draw) -> Problem:
    one, two = d.people(2)
    young, wait = d.number(3, 12), d.number(2, 15)
    old = 2 * young + wait
    gap = calc(f"{old} - {young}")
    time = calc(f"{gap} - {young}")
    question = d.choice(
        (
            f"{one} is {young} and {two} is {old} years old. In how many years will {two} be exactly twice as old as "
            f"{one}?",
            f"Today {two} is {old} and {one} is {young} years old. How many years will pass until {two}'s age is twice "
            f"the age of {one}?",
        )
    )
    return Problem(
        question,
        f"{two} is always {gap.eq} years older than {one}. {two} is twice as old when {one} is as old as this "
        f"difference. That takes {time.eq} years.",
        time,
    )


def times_and_fewer(d: Draw) -> Problem:
    (one, two, three), thing = d.people(3), d.choice(SMALL_THINGS)
    count, ratio = d.number(6, 30), d.number(2, 5)
    fewer = d.number(2, count * ratio - 2)
    second = calc(f"{count} * {ratio}")
    third = calc(f"{second} - {fewer}")
    total = calc(f"{count} + {second} + {third}")
    question = d.choice(
        (
            f"{one} has {thing.of(count)}. {two} has {times(ratio)} as many, and {three} has {fewer} fewer than {two}. "
            f"How many {thing} do they have altogether?",
            f"{one}, {two} and {three} collect {thing}. {one} owns {count}. {two} owns {times(ratio)} as many as "
            f"{one}. {three} owns {fewer} fewer than {two}. How many {thing} are in the three collections?",
        )
    )
    return Problem(
        question,
        f"{two} has {second.eq} {thing}. {three} has {third.eq} {thing}. Altogether they have {total.eq} {thing}.",
        total,
    )


def half_as_many(d: Draw) -> Problem:
    who, thing = d.person(), d.choice(SCHOOL_GOODS + SMALL_THINGS)
    one, two = d.some(("March", "April", "May", "June", "September", "October"), 2)
    count, more = d.number(10, 60, 2), d.number(5, 30)
    half = calc(f"{count} / 2")
    third = calc(f"{half} + {more}")
    total = calc(f"{count} + {half} + {third}")
    question = d.choice(
        (
            f"{who} sold {thing.of(count)} in {one}, half as many in {two}, and in July {more} more than in {two}. "
            f"How many {thing} did {who.he} sell in these three months?",
            f"In {one} a shop sold {thing.of(count)}. In {two} it sold half as many. In July it sold {more} more than "
            f"in {two}. How many {thing} is that in total?",
        )
    )
    return Problem(
        question,
        f"In {two} the sales were {half.eq} {thing}. In July they were {third.eq} {thing}. "
        f"The total is {total.eq} {thing}.",
        total,
    )


def equal_shares_by_giving(d: Draw) -> Problem:
    (one, two), thing = d.people(2), d.choice(SMALL_THINGS)
    few, give, found = d.number(5, 40), d.number(3, 20), d.number(2, 12)
    many = few + found + 2 * give
    after = calc(f"{few} + {found}")
    gap = calc(f"{many} - {after}")
    given = calc(f"{gap} / 2")
    question = d.choice(
        (
            f"{one} has {thing.of(many)} and {two} has {few}. Then {two} finds {found} more. How many {thing} must "
            f"{one} give to {two} so that both have the same number?",
            f"{two} had {thing.of(few)} and just got {found} more. {one} has {many}. To make it fair, {one} gives some "
            f"to {two} until they have equally many. How many does {one} give away?",
        )
    )
    return Problem(
        question,
        f"{two} now has {after.eq} {thing}. {one} has {gap.eq} more than {two}. "
        f"Giving away half of the difference, {given.eq}, makes them equal.",
        given,
    )


def points_over_rounds(d: Draw) -> Problem:
    one, two = d.people(2)
    game = d.choice(("darts", "a quiz", "bowling", "a card game", "mini golf", "archery"))
    first, second = d.number(25, 60), d.number(25, 60)
    more, less = d.some(range(2, 20), 2)
    a, b = calc(f"{first} + {more}"), calc(f"{second} - {less}")
    mine, yours = calc(f"{first} + {second}"), calc(f"{a} + {b}")
    winner, high, low = (two, yours, mine) if more > less else (one, mine, yours)
    gap = calc(f"{high} - {low}")
    question = (
        f"{one} and {two} play two rounds of {game}. {one} scores {first} points and then {second}. {two} scores "
        f"{more} more than {one} in the first round and {less} less in the second. "
    ) + d.choice(
        (
            f"By how many points does {winner} win?",
            "What is the difference between their final scores?",
        )
    )
    return Problem(
        question,
        f"{two} scores {a.eq} points and {b.eq} points. {one} has {mine.eq} points in total and {two} has {yours.eq}. "
        f"The difference is {POINT.eq(gap)}.",
        gap,
    )


def heights_on_a_chain(d: Draw) -> Problem:
    (one, two, three), relative = d.people(3), d.choice(RELATIVES)
    height, up = d.number(120, 175), d.number(4, 20)
    down = d.choice([fall for fall in range(2, 16) if (2 * up - fall) % 3 == 0])
    second = calc(f"{height} + {up}")
    third = calc(f"{second} - {down}")
    total = calc(f"{height} + {second} + {third}")
    mean = calc(f"{total} / 3")
    question = d.choice(
        (
            f"{one} is {height} centimeters tall. {two} is {up} centimeters taller than {one}, and {three} is {down} "
            f"centimeters shorter than {two}. What is their average height in centimeters?",
            f"{two} is {up} centimeters taller than {two.his} {relative} {one}, who measures {height} centimeters. "
            f"{three} is {down} centimeters shorter than {two}. How many centimeters do they measure on average?",
        )
    )
    return Problem(
        question,
        f"{two} is {second.eq} centimeters tall. {three} is {third.eq} centimeters tall. Their heights add up to "
        f"{total.eq} centimeters. On average they are {mean.eq} centimeters tall.",
        mean,
    )


TEMPLATES = (
    ages_in_sum,
    age_years_from_now,
    age_years_ago,
    years_until_twice_as_old,
    times_and_fewer,
    half_as_many,
    equal_shares_by_giving,
    points_over_rounds,
    heights_on_a_chain,
)
