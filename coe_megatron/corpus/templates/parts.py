"""Fractions and percentages."""

from coe_megatron.corpus.templates.arithmetic import Problem, calc, dollars, part_of
from coe_megatron.corpus.templates.words import GOODS, POINT, RELATIVES, SMALL_THINGS, Draw, nouns


def given_away_in_parts(d: Draw) -> Problem:
    (who, other), thing, relative = d.people(2), d.choice(SMALL_THINGS), d.choice(RELATIVES)
    a, b = d.number(2, 5), d.number(2, 5)
    count = a * b * d.number(2, 9)
    first = calc(f"{count} / {a}")
    rest = calc(f"{count} - {first}")
    second = calc(f"{rest} / {b}")
    left = calc(f"{rest} - {second}")
    question = d.choice(
        (
            f"{who} has {thing.of(count)}. {who.He} gives 1/{a} of them to {other} and then 1/{b} of the rest to "
            f"{who.his} {relative}. How many {thing} does {who} have left?",
            f"Out of {thing.of(count)}, {who} hands 1/{a} to {who.his} {relative} and 1/{b} of the remaining ones to "
            f"{other}. How many {thing} does {who.he} keep?",
        )
    )
    return Problem(
        question,
        f"First {who} gives away {first.eq} {thing}, and {rest.eq} are left. "
        f"Then {who.he} gives away {second.eq} more, so {who.he} keeps {left.eq}.",
        left,
    )


def pages_of_a_book(d: Draw) -> Problem:
    who = d.person()
    a, b, days = d.number(3, 6), d.number(2, 5), d.number(2, 6)
    pages = a * b * days * d.number(2, 5)
    first = calc(f"{pages} / {a}")
    rest = calc(f"{pages} - {first}")
    second = calc(f"{rest} / {b}")
    open_pages = calc(f"{rest} - {second}")
    daily = calc(f"{open_pages} / {days}")
    question = d.choice(
        (
            f"A book has {pages} pages. {who} reads 1/{a} of it on the first day and 1/{b} of the rest on the second. "
            f"How many pages a day must {who.he} read to finish it in {days} more days?",
            f"{who} reads 1/{a} of a book of {pages} pages at home and 1/{b} of what is left on the train. {who.He} "
            f"spreads the remaining pages evenly over {days} days. How many pages does {who.he} read on each of them?",
        )
    )
    return Problem(
        question,
        f"{who} first reads {first.eq} pages, which leaves {rest.eq} pages. Then {who.he} reads {second.eq} pages. "
        f"There are {open_pages.eq} pages left. On each day that is {daily.eq} pages.",
        daily,
    )


def part_of_a_part(d: Draw) -> Problem:
    place, group, trait = d.choice(
        (
            ("a school", "play an instrument", "play the violin"),
            ("a camp", "can swim", "have a swimming badge"),
            ("a club", "play chess", "have won a tournament"),
            ("an orchestra", "play a string instrument", "sing in the choir"),
            ("a village", "own a bicycle", "ride it to work"),
        )
    )
    (a, b), (c, e) = d.fraction(), d.fraction()
    people = b * e * d.number(4, 15)
    some = part_of(people, a, b)
    few = part_of(some, c, e)
    others = calc(f"{people} - {few}")
    question = d.choice(
        (
            f"There are {people} people in {place}. {a}/{b} of them {group}, and {c}/{e} of those {trait}. "
            f"How many people are not among those who {trait}?",
            f"Of the {people} people in {place}, {a}/{b} {group}. Of these, {c}/{e} {trait}. "
            f"How many of all the people do not belong to this last group?",
        )
    )
    return Problem(
        question,
        f"The number of people who {group} is {some.eq}. The number of those who {trait} is {few.eq}. "
        f"All the others are {others.eq}.",
        others,
    )


def filling_up_a_tank(d: Draw) -> Problem:
    a, b = d.fraction(lowest=2)
    part = d.number(3, 15)
    vessel = d.choice(nouns("fuel tank, water tank, oil tank, rain barrel, storage tank"))
    liters = a * part
    one = calc(f"{liters} / {a}")
    whole = calc(f"{one} * {b}")
    missing = calc(f"{whole} - {liters}")
    question = d.choice(
        (
            f"{vessel.a.capitalize()} is {a}/{b} full and contains {liters} liters. How many liters are missing?",
            f"There are {liters} liters in {vessel.a}, which is {a}/{b} of what it holds. How many liters are missing?",
        )
    )
    return Problem(
        question,
        f"1/{b} of the {vessel.one} is {one.eq} liters. The full {vessel.one} holds {whole.eq} liters. "
        f"So {missing.eq} liters are missing.",
        missing,
    )


def slices_eaten(d: Draw) -> Problem:
    who, food = d.person(), d.choice(("pizzas", "cakes", "pies", "quiches"))
    a, b = d.fraction()
    slices = d.choice((6, 8, 10, 12))
    count = d.choice([n for n in range(2, 13) if n * slices % b == 0])
    friends = d.number(2, 5)
    whole = calc(f"{count} * {slices}")
    eaten = part_of(whole, a, b)
    left = calc(f"{whole} - {eaten}")
    question = d.choice(
        (
            f"{who} orders {count} {food} for a party with {friends} friends. Each is cut into {slices} slices, and "
            f"{a}/{b} of all the slices are eaten. How many slices are left?",
            f"For {who.his} birthday {who} cuts each of {count} {food} into {slices} slices. The guests eat {a}/{b} of "
            f"them. How many slices remain?",
        )
    )
    return Problem(
        question,
        f"There are {whole.eq} slices in total. The guests eat {eaten.eq} of them, and {left.eq} are left.",
        left,
    )


def sale_and_voucher(d: Draw) -> Problem:
    who, thing = d.person(), d.choice(GOODS)
    price, percent, voucher = d.number(20, 200, 10), d.number(10, 50, 10), d.number(2, 8)
    off = calc(f"{price} * {percent} / 100")
    reduced = calc(f"{price} - {off}")
    paid = calc(f"{reduced} - {voucher}")
    question = d.choice(
        (
            f"A set of {thing} costs ${price}. It is on sale for {percent}% less, and {who} also has a voucher worth "
            f"${voucher}. How much does {who.he} pay?",
            f"{who} finds a box of {thing} for ${price}. The shop takes {percent}% off the price, and then {who.he} "
            f"uses a ${voucher} voucher. How many dollars does {who.he} pay in the end?",
        )
    )
    return Problem(
        question,
        f"The discount is {off.eq} dollars, so the price falls to {reduced.eq} dollars. "
        f"With the voucher {who} pays {paid.eq} dollars.",
        paid,
    )


def bill_with_tip(d: Draw) -> Problem:
    who, meals, price = d.person(), d.number(2, 6), d.number(12, 30, 2)
    percent = d.choice((5, 10, 15, 20, 25))
    place = d.choice(("restaurant", "diner", "cafe", "noodle bar", "taco stand"))
    bill = calc(f"{meals} * {price}")
    tip = calc(f"{bill} * {percent} / 100")
    total = calc(f"{bill} + {tip}")
    question = d.choice(
        (
            f"At a {place}, {who} pays for {meals} meals of ${price} each and adds a tip of {percent}%. "
            f"How much does {who.he} pay altogether?",
            f"{meals} friends each order a meal for ${price} at a {place}. {who} pays the whole bill and leaves a "
            f"{percent}% tip. How many dollars does that come to?",
        )
    )
    return Problem(
        question,
        f"The meals cost {bill.eq} dollars. The tip is {tip.eq} dollars. Altogether {who} pays {total.eq} dollars.",
        total,
    )


def growing_town(d: Draw) -> Problem:
    people, percent, leavers = d.number(2, 40) * 100, d.number(5, 40, 5), d.number(10, 90, 5)
    what, who = d.choice((("town", "inhabitants"), ("school", "students"), ("club", "members"), ("library", "readers")))
    growth = calc(f"{people} * {percent} / 100")
    after = calc(f"{people} + {growth}")
    now = calc(f"{after} - {leavers}")
    question = d.choice(
        (
            f"A {what} had {people} {who}. Their number grew by {percent}% in one year, and in the next year "
            f"{leavers} {who} left. How many {who} does the {what} have now?",
            f"Last year a {what} with {people} {who} gained {percent}% more. This year {leavers} have left. "
            f"How many {who} are there today?",
        )
    )
    return Problem(
        question,
        f"The first year brought {growth.eq} more {who}, which made {after.eq}. "
        f"After {leavers} left, there are {now.eq} {who}.",
        now,
    )


def points_in_a_test(d: Draw) -> Problem:
    who, subject = d.person(), d.choice(("math", "history", "biology", "geography", "spelling", "chemistry"))
    questions, percent = d.number(20, 80, 20), d.number(50, 90, 5)
    points, minus = d.number(2, 6), d.number(1, 2)
    right = calc(f"{questions} * {percent} / 100")
    wrong = calc(f"{questions} - {right}")
    won, lost = calc(f"{right} * {points}"), calc(f"{wrong} * {minus}")
    score = calc(f"{won} - {lost}")
    question = (
        f"A {subject} test has {questions} questions. A right answer gives {points} points and a wrong one costs "
        f"{POINT.of(minus)}. "
    ) + d.choice(
        (
            f"{who} answers all of them and gets {percent}% right. What is {who.his} score?",
            f"How many points does {who} reach with {percent}% of the answers right and the others wrong?",
        )
    )
    return Problem(
        question,
        f"{who} has {right.eq} right answers and {wrong.eq} wrong ones. The right ones give {won.eq} points and the "
        f"wrong ones cost {lost.eq} points. The score is {score.eq}.",
        score,
    )


def salary_after_a_raise(d: Draw) -> Problem:
    who, salary, percent = d.person(), d.number(20, 60) * 100, d.number(2, 15)
    job = d.choice(("nurse", "teacher", "baker", "librarian", "gardener", "driver", "carpenter"))
    more = calc(f"{salary} * {percent} / 100")
    month = calc(f"{salary} + {more}")
    year = calc(f"{month} * 12")
    question = d.choice(
        (
            f"{who} works as a {job} and earns ${salary} a month. After a raise of {percent}%, how much does "
            f"{who.he} earn in a year?",
            f"A {job} named {who} earns ${salary} a month and gets {percent}% more from now on. "
            f"How many dollars is that in twelve months?",
        )
    )
    return Problem(
        question,
        f"The raise is {more.eq} dollars a month. The new salary is {month.eq} dollars a month. "
        f"In a year {who} earns {year.eq} dollars.",
        year,
    )


def commission_on_sales(d: Draw) -> Problem:
    who, base, percent = d.person(), d.number(200, 900, 50), d.number(2, 12)
    count, price = d.number(3, 20), d.number(100, 600, 50)
    thing = d.choice(nouns("bicycle, sofa, camera, laptop, washing machine, carpet, piano, television"))
    sales = calc(f"{count} * {price}")
    bonus = calc(f"{sales} * {percent} / 100")
    pay = calc(f"{base} + {bonus}")
    question = d.choice(
        (
            f"{who} is paid ${base} a week plus {percent}% of what {who.he} sells. This week {who.he} sold "
            f"{thing.of(count)} for {dollars(price)} each. How much does {who.he} earn this week?",
            f"In one week {who} sells {thing.of(count)} at {dollars(price)} each. {who.His} pay is ${base} and "
            f"{percent}% of the sales. How many dollars is {who.he} paid?",
        )
    )
    return Problem(
        question,
        f"The sales come to {sales.eq} dollars. {who}'s share of them is {bonus.eq} dollars. "
        f"The pay for the week is {pay.eq} dollars.",
        pay,
    )


TEMPLATES = (
    given_away_in_parts,
    pages_of_a_book,
    part_of_a_part,
    filling_up_a_tank,
    slices_eaten,
    sale_and_voucher,
    bill_with_tip,
    growing_town,
    points_in_a_test,
    salary_after_a_raise,
    commission_on_sales,
)
