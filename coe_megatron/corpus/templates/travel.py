"""Travel: distance, speed, fuel, meeting and catching up."""

from coe_megatron.corpus.templates.arithmetic import Problem, calc
from coe_megatron.corpus.templates.words import CITIES, HOUR, Draw, times


def two_legs(d: Draw) -> Problem:
    who, (start, end) = d.person(), d.some(CITIES, 2)
    v, t, w, s = d.number(40, 75, 5), d.number(2, 5), d.number(30, 70, 5), d.number(2, 4)
    first, second = calc(f"{v} * {t}"), calc(f"{w} * {s}")
    total = calc(f"{first} + {second}")
    question = d.choice(
        (
            f"{who} drives from {start} to {end}: {HOUR.of(t)} at {v} miles per hour and then {HOUR.of(s)} at {w} "
            f"miles per hour. How many miles is the trip?",
            f"On the way to {end}, {who} drives at {v} miles per hour for {HOUR.of(t)}. Rain slows {who.him} to {w} "
            f"miles per hour for the last {HOUR.of(s)}. How far does {who} drive in miles?",
        )
    )
    return Problem(
        question,
        f"In the first part {who} covers {first.eq} miles. In the second part {who.he} covers {second.eq} miles. "
        f"The whole trip is {total.eq} miles.",
        total,
    )


def average_speed(d: Draw) -> Problem:
    who = d.person()
    t, s, mean = d.number(1, 4), d.number(1, 4), d.number(8, 24)
    how, unit = d.choice((("cycles", "bike ride"), ("rides a scooter", "ride"), ("rows a boat", "tour")))
    shift = d.number(-mean // 4, mean // 4)
    first, second = mean * t + shift, mean * s - shift
    distance, time = calc(f"{first} + {second}"), calc(f"{t} + {s}")
    speed = calc(f"{distance} / {time}")
    question = (
        f"{who} {how} {first} kilometers in {HOUR.of(t)}, and after a rest {second} kilometers in {HOUR.of(s)}. "
    ) + d.choice(
        (
            f"Not counting the rest, what is {who.his} average speed in kilometers per hour?",
            f"What is the average speed of this {unit} in kilometers per hour, leaving out the rest?",
        )
    )
    return Problem(
        question,
        f"{who} covers {distance.eq} kilometers. It takes {who.him} {time.eq} hours. "
        f"The average speed is {speed.eq} kilometers per hour.",
        speed,
    )


def fuel_for_a_trip(d: Draw) -> Problem:
    who, (start, end) = d.person(), d.some(CITIES, 2)
    mileage, gallons, price = d.number(20, 45, 5), d.number(3, 9), d.number(3, 5)
    distance = mileage * gallons
    both = calc(f"{distance} * 2")
    fuel = calc(f"{both} / {mileage}")
    cost = calc(f"{fuel} * {price}")
    question = d.choice(
        (
            f"It is {distance} miles from {start} to {end}. {who}'s car goes {mileage} miles on a gallon, and a gallon "
            f"costs ${price}. How much does the fuel for the way there and back cost?",
            f"{who} drives {distance} miles to {end} and the same way back. The car uses one gallon for {mileage} "
            f"miles. At ${price} a gallon, how many dollars does {who.he} spend on fuel?",
        )
    )
    return Problem(
        question,
        f"There and back is {both.eq} miles. The car needs {fuel.eq} gallons. They cost {cost.eq} dollars.",
        cost,
    )


def meeting_on_the_way(d: Draw) -> Problem:
    (one, two), (start, end) = d.people(2), d.some(CITIES, 2)
    v, w, hours = d.number(10, 30), d.number(10, 30), d.number(2, 6)
    way = (v + w) * hours
    closing = calc(f"{v} + {w}")
    time = calc(f"{way} / {closing}")
    question = d.choice(
        (
            f"{start} and {end} are {way} kilometers apart. {one} leaves {start} at {v} kilometers per hour, and at "
            f"the same moment {two} leaves {end} at {w} kilometers per hour. After how many hours do they meet?",
            f"{one} and {two} cycle towards each other on a road of {way} kilometers. {one} rides at {v} kilometers "
            f"per hour and {two} at {w} kilometers per hour. How many hours pass until they meet?",
        )
    )
    return Problem(
        question,
        f"Every hour they come {closing.eq} kilometers closer. They meet after {time.eq} hours.",
        time,
    )


def catching_up(d: Draw) -> Problem:
    one, two = d.people(2)
    gain, hours = d.number(2, 9), d.number(2, 6)
    head = d.choice([h for h in range(1, 7) if gain * hours % h == 0 and gain * hours // h > 2])
    slow = gain * hours // head
    fast = slow + gain
    lead = calc(f"{slow} * {head}")
    closer = calc(f"{fast} - {slow}")
    time = calc(f"{lead} / {closer}")
    question = d.choice(
        (
            f"{one} sets out at {slow} kilometers per hour. {HOUR.of(head).capitalize()} later {two} follows on the "
            f"same road at {fast} kilometers per hour. How many hours does {two} need to catch up?",
            f"{two} starts {HOUR.of(head)} after {one}. {one} moves at {slow} kilometers per hour and {two} at {fast} "
            f"kilometers per hour. How many hours after {two.his} own start does {two} reach {one}?",
        )
    )
    return Problem(
        question,
        f"When {two} starts, {one} is {lead.eq} kilometers ahead. {two} gains {closer.eq} kilometers every hour. "
        f"So it takes {time.eq} hours.",
        time,
    )


def commute_in_weeks(d: Draw) -> Problem:
    who, way, days, weeks = d.person(), d.number(3, 28), d.number(3, 5), d.number(2, 8)
    daily = calc(f"{way} * 2")
    weekly = calc(f"{daily} * {days}")
    total = calc(f"{weekly} * {weeks}")
    question = d.choice(
        (
            f"{who} lives {way} miles from work and drives there and back {days} days a week. "
            f"How many miles is that in {weeks} weeks?",
            f"The office is {way} miles from {who}'s home. {who.He} goes there by bike {days} days a week and comes "
            f"home the same way. How many miles does {who.he} ride in {weeks} weeks?",
        )
    )
    return Problem(
        question,
        f"There and back is {daily.eq} miles. In a week that is {weekly.eq} miles. "
        f"In {weeks} weeks it is {total.eq} miles.",
        total,
    )


def hike_with_stops(d: Draw) -> Problem:
    who, pace, stops, pause = d.person(), d.number(10, 20), d.number(2, 5), d.number(5, 20, 5)
    length = d.number(4, 14)
    goal = d.choice(("the lake", "the mountain hut", "the lighthouse", "the waterfall", "the old tower"))
    walking, resting = calc(f"{length} * {pace}"), calc(f"{stops} * {pause}")
    total = calc(f"{walking} + {resting}")
    question = d.choice(
        (
            f"The path to {goal} is {length} kilometers long. {who} needs {pace} minutes for a kilometer and rests "
            f"{times(stops)} for {pause} minutes. How many minutes does the hike take?",
            f"{who} hikes {length} kilometers to {goal}. {who.He} walks a kilometer in {pace} minutes and makes "
            f"{stops} stops of {pause} minutes each. After how many minutes does {who.he} arrive?",
        )
    )
    return Problem(
        question,
        f"Walking takes {walking.eq} minutes. The stops take {resting.eq} minutes. "
        f"Altogether the hike takes {total.eq} minutes.",
        total,
    )


def rest_of_the_road(d: Draw) -> Problem:
    who, end = d.person(), d.choice(CITIES)
    speed, done, left = d.number(40, 70, 5), d.number(2, 4), d.number(1, 4)
    pace = d.choice([p for p in range(30, 75, 5) if speed * left % p == 0])
    whole = speed * (done + left)
    covered = calc(f"{speed} * {done}")
    rest = calc(f"{whole} - {covered}")
    time = calc(f"{rest} / {pace}")
    question = (
        f"{end} is {whole} miles away. {who} drives at {speed} miles per hour for {HOUR.of(done)}. "
    ) + d.choice(
        (
            f"How many hours will the rest take at {pace} miles per hour?",
            f"If {who.he} goes on at {pace} miles per hour, how many more hours does {who.he} need?",
        )
    )
    return Problem(
        question,
        f"{who} has covered {covered.eq} miles. There are {rest.eq} miles left. "
        f"At {pace} miles per hour they take {HOUR.eq(time)}.",
        time,
    )


TEMPLATES = (
    two_legs,
    average_speed,
    fuel_for_a_trip,
    meeting_on_the_way,
    catching_up,
    commute_in_weeks,
    hike_with_stops,
    rest_of_the_road,
)
