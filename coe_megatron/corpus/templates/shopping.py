"""Shopping: prices, change, packs, offers."""

from coe_megatron.corpus.templates.arithmetic import Problem, calc, dollars
from coe_megatron.corpus.templates.words import BAKED, DOLLAR, FRUIT, GOODS, SCHOOL_GOODS, Draw, nouns


def change_from_bill(d: Draw) -> Problem:
    who, thing, count, price = d.person(), d.choice(GOODS), d.number(2, 9), d.number(3, 19)
    cost = calc(f"{count} * {price}")
    paid = (int(cost) // 20 + 1) * 20
    change = calc(f"{paid} - {cost}")
    question = d.choice(
        (
            f"{who} buys {thing.of(count)} for ${price} each and hands the cashier ${paid}. "
            f"How much change does {who.he} get?",
            f"A shop sells {thing} at ${price} each. {who} takes {count} of them and pays with ${paid}. "
            f"How many dollars should {who} get back?",
        )
    )
    return Problem(
        question,
        f"The {thing} cost {cost.eq} dollars in total. {who} paid {paid} dollars, so {who.his} change is "
        f"{DOLLAR.eq(change)}.",
        change,
    )


def two_kinds_of_goods(d: Draw) -> Problem:
    who, (first, second) = d.person(), d.some(SCHOOL_GOODS, 2)
    n, m, p, q = d.number(2, 12), d.number(2, 12), d.number(1, 8), d.number(2, 9)
    one, two = calc(f"{n} * {p}"), calc(f"{m} * {q}")
    total = calc(f"{one} + {two}")
    question = d.choice(
        (
            f"{first.a.capitalize()} costs ${p} and {second.a} costs ${q}. How much does {who} pay for "
            f"{first.of(n)} and {second.of(m)}?",
            f"For the new school year {who} needs {first.of(n)} at ${p} each and {second.of(m)} at ${q} each. "
            f"What is the total cost in dollars?",
        )
    )
    return Problem(
        question,
        f"The {first} cost {one.eq} dollars. The {second} cost {two.eq} dollars. Together that is {total.eq} dollars.",
        total,
    )


def spend_the_rest(d: Draw) -> Problem:
    who, thing, treat = d.person(), d.choice(GOODS), d.choice(BAKED)
    price, each, count = d.number(8, 40), d.number(2, 6), d.number(2, 12)
    money = price + each * count
    left = calc(f"{money} - {price}")
    bought = calc(f"{left} / {each}")
    question = d.choice(
        (
            f"{who} has ${money}. {who.He} buys {thing.a} for ${price} and spends the rest on {treat} that cost "
            f"${each} each. How many {treat} does {who.he} buy?",
            f"With ${money} in {who.his} pocket, {who} pays ${price} for {thing.a}. How many {treat} at ${each} each "
            f"can {who.he} buy with what is left?",
        )
    )
    return Problem(
        question,
        f"After buying the {thing.one}, {who} has {left.eq} dollars left. Each {treat.one} costs {each} dollars, "
        f"so {who.he} can buy {bought.eq} {treat.one if int(bought) == 1 else treat.many}.",
        bought,
    )


def packs_needed(d: Draw) -> Problem:
    who, treat = d.person(), d.choice(BAKED)
    size, packs, price = d.choice((4, 6, 8, 10, 12)), d.number(2, 9), d.number(3, 9)
    each = d.choice([portion for portion in (2, 3) if size * packs % portion == 0])
    guests = size * packs // each
    needed = calc(f"{guests} * {each}")
    boxes = calc(f"{needed} / {size}")
    cost = calc(f"{boxes} * {price}")
    question = (
        f"{who} wants to serve {treat.of(each)} to each of {who.his} {guests} guests. "
        f"The {treat} come in boxes of {size}, and a box costs ${price}. "
    ) + d.choice((f"How much will {who} spend?", f"What does {who} pay for all the boxes, in dollars?"))
    return Problem(
        question,
        f"{who} needs {needed.eq} {treat}. That is {boxes.eq} boxes. The boxes cost {cost.eq} dollars.",
        cost,
    )


def buy_some_get_one_free(d: Draw) -> Problem:
    who, thing = d.person(), d.choice(FRUIT + BAKED)
    bundle, groups, price = d.number(2, 5), d.number(2, 9), d.number(2, 7)
    total = (bundle + 1) * groups
    size = calc(f"{bundle} + 1")
    offers = calc(f"{total} / {size}")
    paid = calc(f"{offers} * {bundle}")
    cost = calc(f"{paid} * {price}")
    question = d.choice(
        (
            f"A market stall gives one {thing.one} free for every {bundle} bought. Each {thing.one} costs ${price}. "
            f"How much does {who} pay to take home {thing.of(total)}?",
            f"{who} wants {thing.of(total)}. They cost ${price} each, but with every {bundle} paid for, one more is "
            f"free. How many dollars does {who} spend?",
        )
    )
    return Problem(
        question,
        f"One offer holds {size.eq} {thing}. {who} uses the offer {offers.eq} times. "
        f"So {who.he} pays for {paid.eq} {thing}, which cost {cost.eq} dollars.",
        cost,
    )


def cheaper_shop(d: Draw) -> Problem:
    who, thing, count = d.person(), d.choice(GOODS), d.number(3, 12)
    near, gap, shipping = d.number(9, 30), d.number(3, 6), d.number(2, 5)
    online = near - gap
    local = calc(f"{count} * {near}")
    goods = calc(f"{count} * {online}")
    web = calc(f"{goods} + {shipping}")
    saved = calc(f"{local} - {web}")
    question = d.choice(
        (
            f"{who} needs {thing.of(count)}. The local shop asks ${near} for each. Online they cost ${online} each, "
            f"plus ${shipping} for shipping the whole order. How much does {who} save by ordering online?",
            f"{thing.a.capitalize()} costs ${near} in town and ${online} on a website that charges ${shipping} for "
            f"shipping an order. How much cheaper is it to order {thing.of(count)} on the website?",
        )
    )
    return Problem(
        question,
        f"In the shop the {thing} cost {local.eq} dollars. Online they cost {goods.eq} dollars, and with shipping "
        f"{web.eq} dollars. The difference is {saved.eq} dollars.",
        saved,
    )


def fruit_by_weight(d: Draw) -> Problem:
    who, (first, second) = d.person(), d.some(FRUIT, 2)
    kilos, grams = d.number(2, 6), d.choice((250, 500, 750))
    p, q = d.number(2, 6), d.choice((4, 8))
    one = calc(f"{kilos} * {p}")
    two = calc(f"{grams} * {q} / 1000")
    total = calc(f"{one} + {two}")
    question = (
        f"At the market {first} cost {dollars(p)} a kilogram and {second} cost {dollars(q)} a kilogram. "
        f"{who} buys {kilos} kilograms of {first} and {grams} grams of {second}. "
    ) + d.choice((f"How many dollars does {who} pay?", "What is the price of it all?"))
    return Problem(
        question,
        f"The {first} cost {one.eq} dollars. There are 1000 grams in a kilogram, so the {second} cost "
        f"{DOLLAR.eq(two)}. In total {who} pays {total.eq} dollars.",
        total,
    )


def shared_ticket_price(d: Draw) -> Problem:
    who = d.person()
    place = d.choice(("museum", "zoo", "aquarium", "theater", "castle", "planetarium", "swimming pool"))
    adults, children, child = d.number(2, 5), d.number(2, 8), d.number(4, 9)
    more = d.number(2, 9)
    adult = calc(f"{child} + {more}")
    grown, young = calc(f"{adults} * {adult}"), calc(f"{children} * {child}")
    total = calc(f"{grown} + {young}")
    kind = d.choice(nouns("child/children, student, teenager"))
    question = (
        f"At the {place}, a ticket for a {kind.one} costs ${child} and a ticket for an adult costs ${more} more. "
    ) + d.choice(
        (
            f"How much do {adults} adults and {kind.of(children)} pay together?",
            f"{who} buys tickets for {adults} adults and {kind.of(children)}. How much does {who.he} pay?",
        )
    )
    return Problem(
        question,
        f"An adult's ticket costs {adult.eq} dollars. The adults pay {grown.eq} dollars and the {kind} pay "
        f"{young.eq} dollars. That makes {total.eq} dollars.",
        total,
    )


TEMPLATES = (
    change_from_bill,
    two_kinds_of_goods,
    spend_the_rest,
    packs_needed,
    buy_some_get_one_free,
    cheaper_shop,
    fruit_by_weight,
    shared_ticket_price,
)
