"""The functions that the demonstration's requests call, and the phrasings of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["FUNCTIONS", "Function", "Phrasing"]


@dataclass(frozen=True)
class Phrasing:
    """Words with `{slots}`, and the arguments that the words fix by themselves."""

    words: str
    fixed: Mapping[str, str]


@dataclass(frozen=True)
class Function:
    """A function's argument names in the order of its calls, and its phrasings by split, one a line."""

    arguments: tuple[str, ...]
    train: str
    test: str

    def phrasings(self, split: str) -> list[Phrasing]:
        """The phrasings of "train" or "test"."""
        return [_phrasing(line) for line in (self.train if split == "train" else self.test).strip().splitlines()]


def _phrasing(line: str) -> Phrasing:
    words, _, fixed = line.partition("|")
    return Phrasing(words.strip(), dict(pair.split("=") for pair in fixed.split()))


FUNCTIONS: dict[str, Function] = {
    "set_light": Function(
        ("room", "state", "color", "brightness"),
        train="""
            turn on the {room} lights | state=on
            turn the {room} light on | state=on
            switch on the lights in the {room} | state=on
            i need some light in the {room} | state=on
            turn off the {room} lights | state=off
            kill the lights in the {room} | state=off
            switch the {room} light off | state=off
            no more light in the {room} | state=off
            set the {room} lights to {brightness} percent
            dim the lights in the {room} to {brightness} percent
            bring the {room} light up to {brightness} percent
            make the {room} lights {color}
            change the light in the {room} to {color}
            i want {color} light in the {room}
            """,
        test="""
            put the lights on in the {room} | state=on
            light up the {room} | state=on
            lights out in the {room} | state=off
            the {room} lights should be off | state=off
            i want the {room} at {brightness} percent light
            take the brightness in the {room} to {brightness} percent
            turn the {room} lights {color}
            """,
    ),
    "set_heating": Function(
        ("room", "degrees"),
        train="""
            set the {room} to {degrees} degrees
            make it {degrees} degrees in the {room}
            heat the {room} to {degrees}
            i want {degrees} degrees in the {room}
            turn the heating in the {room} to {degrees}
            put the thermostat in the {room} at {degrees} degrees
            cool the {room} down to {degrees} degrees
            can the {room} be {degrees} degrees
            warm up the {room} to {degrees} degrees
            """,
        test="""
            change the temperature in the {room} to {degrees}
            bring the {room} to {degrees} degrees
            the {room} should be at {degrees} degrees
            i'd like the heating at {degrees} in the {room}
            """,
    ),
    "start_timer": Function(
        ("minutes", "label"),
        train="""
            set a timer for {minutes} minutes
            start a {minutes} minute timer
            count down {minutes} minutes
            give me {minutes} minutes on the clock
            timer for {minutes} minutes
            set a {minutes} minute timer for the {label}
            start a timer for the {label} {minutes} minutes
            the {label} needs {minutes} minutes set a timer
            {label} timer {minutes} minutes
            tell me when {minutes} minutes are up for the {label}
            """,
        test="""
            time {minutes} minutes
            let me know when {minutes} minutes have passed
            i need a {minutes} minute countdown for the {label}
            put {minutes} minutes on a timer for the {label}
            time the {label} for {minutes} minutes
            """,
    ),
    "set_alarm": Function(
        ("day", "time"),
        train="""
            wake me up at {time}
            set an alarm for {time}
            alarm at {time}
            i have to get up at {time}
            wake me {day} at {time}
            set an alarm for {time} {day}
            {day} i need an alarm at {time}
            make the alarm go off at {time} {day}
            put my alarm on for {day} at {time}
            """,
        test="""
            i need to be up by {time}
            get me out of bed at {time}
            i want to wake up at {time} {day}
            ring the alarm {day} at {time}
            have an alarm ready at {time} {day}
            """,
    ),
    "play_music": Function(
        ("music", "room"),
        train="""
            play {music}
            put on {music}
            i want to hear {music}
            start some {music}
            let's listen to {music}
            play {music} in the {room}
            put {music} on in the {room}
            i feel like {music} in the {room}
            can we have {music} in the {room}
            get {music} going in the {room}
            """,
        test="""
            i'm in the mood for {music}
            let me hear some {music}
            could we listen to {music} in the {room}
            start playing {music} in the {room}
            bring up {music} on the {room} speaker
            """,
    ),
    "add_event": Function(
        ("title", "day", "time"),
        train="""
            add {title} to my calendar {day} at {time}
            put {title} in my calendar for {day} at {time}
            i have {title} {day} at {time}
            schedule {title} for {day} at {time}
            {title} is {day} at {time} write that down
            book {title} {day} {time}
            new event {title} {day} at {time}
            remind me of {title} {day} at {time}
            make a note i've got {title} at {time} {day}
            """,
        test="""
            enter {title} {day} at {time} in the calendar
            plan {title} for {time} {day}
            there's {title} {day} at {time} put it in my calendar
            save the date {title} {day} at {time}
            block {day} at {time} for {title}
            """,
    ),
    "send_message": Function(
        ("to", "text"),
        train="""
            tell {to} {text}
            text {to} {text}
            send a message to {to} saying {text}
            message {to} {text}
            let {to} know {text}
            write to {to} that {text}
            send {to} a text that says {text}
            can you text {to} and say {text}
            say {text} in a message to {to}
            """,
        test="""
            drop {to} a line saying {text}
            inform {to} that {text}
            shoot {to} a text that {text}
            send {text} to {to}
            write {to} a message saying {text}
            """,
    ),
    "add_to_list": Function(
        ("item", "list"),
        train="""
            add {item} to the {list} list
            put {item} on the {list} list
            we need {item} put that on the {list} list
            {item} for the {list} list
            i want {item} on my {list} list
            write {item} on the {list} list
            don't let me forget {item} on the {list} list
            the {list} list needs {item}
            note {item} down on my {list} list
            """,
        test="""
            stick {item} on the {list} list
            could the {list} list have {item} too
            we're out of {item} add it to the {list} list
            include {item} in my {list} list
            {item} goes on the {list} list
            """,
    ),
}
