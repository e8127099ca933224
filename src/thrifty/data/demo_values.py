"""The values that fill the slots of the demonstration's requests, and the words said around a request.

A slot has one list for both splits, or one for each. Of a range, the test split also says numbers that training never
says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["FILLERS", "VALUES", "Fillers"]


@dataclass(frozen=True)
class Fillers:
    """What may stand before, inside and after a request."""

    openings: Sequence[str]
    hesitations: Sequence[str]
    endings: Sequence[str]


def _listed(text: str) -> list[str]:
    return [" ".join(item.split()) for item in text.split(",")]


VALUES: dict[str, Mapping[str, Sequence[str]] | Sequence[str] | range] = {
    "room": _listed(
        """
            kitchen, bedroom, living room, bathroom, hallway, office, garage, basement, dining room,
            nursery
            """
    ),
    "day": _listed("today, tomorrow, monday, tuesday, wednesday, thursday, friday, saturday, sunday"),
    "color": {
        "train": _listed("red, blue, green, orange, purple, yellow, warm white"),
        "test": _listed("pink, turquoise, violet, gold"),
    },
    "brightness": range(5, 100),
    "degrees": range(14, 29),
    "minutes": range(2, 91),
    "label": {
        "train": _listed(
            """
            pasta, eggs, rice, laundry, pizza, bread, tea, oven, chicken, cookies, dryer, soup, workout,
            nap
            """
        ),
        "test": _listed("potatoes, lasagna, roast, coffee, face mask, dishwasher, muffins, dumplings"),
    },
    "music": {
        "train": _listed(
            """
            jazz, mozart, the beatles, heavy metal, country, david bowie, reggae, daft punk, rain
            sounds, nina simone, disco, queen, bach, hip hop, lullabies, miles davis, folk music, the
            rolling stones, techno, johnny cash, whale songs, stevie wonder, piano music, abba, movie
            scores, latin pop, pink floyd, salsa, blues, taylor swift
            """
        ),
        "test": _listed(
            """
            bossa nova, leonard cohen, chopin, ocean waves, radiohead, gospel, tango, ella fitzgerald,
            the kinks, string quartets, sea shanties, kate bush, flamenco, electro swing
            """
        ),
    },
    "title": {
        "train": _listed(
            """
            dentist, team meeting, yoga class, lunch with anna, parents evening, car service, piano
            lesson, haircut, book club, date night, job interview, doctor's appointment, swimming,
            budget review, dinner with the smiths, flight to berlin, soccer practice, vet visit, call
            with the bank, birthday party, school play, project kickoff, choir, movie night
            """
        ),
        "test": _listed(
            """
            eye exam, wedding rehearsal, coffee with george, chess club, house viewing, guitar lesson,
            blood test, pottery class, train to vienna, breakfast with the team, tax appointment, poker
            night, physio, garden party
            """
        ),
    },
    "to": {
        "train": _listed(
            """
            mom, dad, anna, peter, julia, my boss, laura, tom, the babysitter, michael, sophie, grandma,
            daniel, emma, my sister, lucas, maria, the landlord, kevin, nina, paul, sarah, uncle bob,
            olivia
            """
        ),
        "test": _listed(
            """
            george, my brother, hannah, aunt rose, felix, the plumber, isabel, grandpa, victor, naomi,
            my neighbor, oscar
            """
        ),
    },
    "text": {
        "train": _listed(
            """
            i'm running late, dinner is ready, i'll be home at six, the train is delayed, happy
            birthday, we need to talk, the keys are under the mat, i can't make it tonight, i'm at the
            airport, please call me back, the meeting is cancelled, i love you, thanks for the flowers,
            i'm stuck in traffic, the kids are asleep, the package arrived, good luck, see you at the
            station, i forgot my wallet, we're out of gas, the concert was great, don't wait for me, the
            doctor says it's fine, i'll bring dessert
            """
        ),
        "test": _listed(
            """
            the plane has landed, i left my phone at work, the soup is on the stove, we won the game,
            i'll pick up the children, the power is out, congratulations on the new job, it's snowing
            here, the car broke down, lunch is at noon, my battery is almost empty, the cat is hiding
            again
            """
        ),
    },
    "item": {
        "train": _listed(
            """
            milk, bread, two lemons, toothpaste, olive oil, batteries, bananas, coffee filters, a dozen
            eggs, sunscreen, paper towels, cheese, onions, light bulbs, socks, dog food, yogurt, stamps,
            soap, tomatoes, a phone charger, rice, wrapping paper, carrots, butter, cat litter, green
            tea, passport, umbrella, nails
            """
        ),
        "test": _listed(
            """
            honey, spinach, three avocados, shampoo, sandpaper, peanut butter, candles, a raincoat, oat
            milk, garlic, trash bags, hiking boots, mushrooms, envelopes
            """
        ),
    },
    "list": _listed("shopping, packing, grocery, to do, gift, camping, hardware store, pharmacy"),
}

FILLERS: dict[str, Fillers] = {
    "train": Fillers(
        openings=_listed(
            """
            hey, please, okay, um, could you please, hi, so, alright, uh, oh and, listen, one more
            thing, quick
            """
        ),
        hesitations=_listed("uh, um, you know, hmm"),
        endings=_listed("please, thanks, thank you, okay, if you can, for me, right now"),
    ),
    "test": Fillers(
        openings=_listed("hello, um, please, okay so, would you please, er, right, hey there"),
        hesitations=_listed("er, um, ah"),
        endings=_listed("please, thank you very much, would you, cheers, thanks"),
    ),
}
