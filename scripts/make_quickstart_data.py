"""Write the quickstart's data: a customer's message in, the order as strict JSON out.

    python scripts/make_quickstart_data.py [--folder recipes/data] [--difficulty 1]

The same arguments always write the same files. No order of the held-out file is in the training file, and part of its
phrases, items and cities are in none of the training rows.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

TRAIN_ROWS = 480
HELDOUT_ROWS = 60
SEED = 20


class Difficulty(NamedTuple):
    """How often a message is made harder, as shares of the rows."""

    misleading: float  # a sentence with another number, color or city in it
    lowercase: float  # the whole message in lower case
    unseen: float  # in the held-out file: a phrase, item or city that no training row has


DIFFICULTIES = [Difficulty(0.0, 0.0, 0.0), Difficulty(0.15, 0.08, 0.15), Difficulty(0.4, 0.2, 0.5)]


class Words(NamedTuple):
    """What both files use, and what only the held-out file uses."""

    common: list[str]
    heldout: list[str]


HOME = ["candle", "lamp", "blanket", "pillow", "basket", "brush", "towel", "clock", "chair", "poster", "vase"]
KITCHEN = ["mug", "teapot", "plate", "kettle", "bowl"]
ITEMS = Words([*HOME, *KITCHEN, "notebook", "backpack", "umbrella", "shirt"], ["bottle", "jacket"])
PLURALS = {"brush": "brushes"}
COLORS = ["red", "blue", "green", "black", "white", "yellow", "purple", "grey", "orange", "pink"]
EUROPE = ["Oslo", "Paris", "Berlin", "Madrid", "Lisbon", "Vienna", "Dublin", "Prague", "Athens", "Rome", "Hamburg"]
OVERSEAS = ["Boston", "Chicago", "Denver", "Austin", "Seattle", "Cairo", "Lima", "Tokyo"]
CITIES = Words([*EUROPE, *OVERSEAS], ["Toronto", "Munich", "Dallas"])
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
NAMES = ["Maria", "Tom", "Aisha", "Ken", "Lena", "Omar", "Ingrid", "Paul", "Mei", "Jonas"]
QUANTITIES = {
    1: ["a", "one", "1", "just one", "a single"],
    2: ["two", "2", "a couple of", "a pair of"],
    3: ["three", "3"],
    4: ["four", "4"],
    5: ["five", "5"],
    6: ["six", "6", "half a dozen"],
    8: ["eight", "8"],
    10: ["ten", "10"],
    12: ["twelve", "12", "a dozen"],
    20: ["twenty", "20"],
}

ASK = Words(
    [
        "I'd like {goods}",
        "Can I get {goods}",
        "Please send {goods}",
        "I need {goods}",
        "We want to order {goods}",
        "Could you send me {goods}",
        "I'm looking for {goods}",
        "Put me down for {goods}",
        "I'll take {goods}",
    ],
    ["I would love to have {goods}", "Please get me {goods}"],
)
# after the asking, in the same sentence
CITY_INSIDE = Words(["to {city}", "for delivery to {city}", "shipped to {city}"], ["for my address in {city}"])
DAY_INSIDE = Words(["by {day}", "for {day}", "on {day}"], ["no later than {day}"])
GIFT_INSIDE = Words(["gift-wrapped", "as a gift", "wrapped as a present"], ["in gift wrap"])
# a sentence of its own
CITY_ALONE = Words(
    [
        "Ship to {city}.",
        "Deliver it to {city}.",
        "I live in {city}.",
        "The address is in {city}.",
        "It goes to {city}.",
    ],
    ["Please have it brought to {city}."],
)
DAY_ALONE = Words(
    ["It has to be here on {day}.", "{day} would be best.", "Please deliver on {day}.", "I need it by {day}."],
    ["Let it arrive on {day}."],
)
GIFT_ALONE = Words(
    ["It is a present.", "Please wrap it as a gift.", "Gift wrap, please.", "It's a birthday gift."],
    ["It's a gift for my mother."],
)
NO_GIFT = Words(["No gift wrap needed.", "It is for myself.", "Please don't wrap it."], ["It's not a present."])
HELLO = Words(["Hi!", "Hello, this is {name}.", "Good morning.", "Hey there!", "{name} here."], ["Good evening!"])
BYE = Words(["Thanks!", "Thank you, {name}", "Love your shop.", "Best, {name}", "Many thanks."], ["Cheers, {name}"])
MISLEADING = Words(
    ["My last order took {number} days.", "My cousin in {city} told me about you.", "I already have a {color} one."],
    ["A friend in {city} has {number} of them."],
)
# the whole order in one note: what is missing is left out
NOTES = ["{goods}{to}{by}{gift}", "Order: {goods}{to}{by}{gift}", "New order: {goods}{by}{to}{gift}"]


class Writer:
    """Draws words and phrases; `unseen` is the chance to draw one that only the held-out file has."""

    def __init__(self, rng: random.Random, unseen: float):
        self.rng = rng
        self.unseen = unseen

    def draw(self, words: Words) -> str:
        """One word or phrase."""
        return self.rng.choice(words.heldout if self.rng.random() < self.unseen else words.common)

    def maybe(self, share: float) -> bool:
        """True in this share of the cases."""
        return self.rng.random() < share

    def order(self) -> dict:
        """An order: what the model has to write."""
        return {
            "item": self.draw(ITEMS),
            "quantity": self.rng.choice(list(QUANTITIES)),
            "color": self.rng.choice(COLORS) if self.maybe(0.7) else None,
            "city": self.draw(CITIES) if self.maybe(0.85) else None,
            "day": self.rng.choice(DAYS) if self.maybe(0.65) else None,
            "gift": self.maybe(0.4),
        }

    def goods(self, order: dict) -> str:
        """`a couple of red mugs`."""
        item = order["item"]
        name = item if order["quantity"] == 1 else PLURALS.get(item, item + "s")
        described = f"{order['color']} {name}" if order["color"] else name
        count = self.rng.choice(QUANTITIES[order["quantity"]])
        return f"{'an' if count == 'a' and described[0] in 'aeiou' else count} {described}"

    def note(self, order: dict) -> str:
        """A message without sentences: `Order: 2 red mugs, Oslo, Friday, gift wrap`."""
        parts = {
            "goods": self.goods(order),
            "to": f", {order['city']}" if order["city"] else "",
            "by": f", {order['day']}" if order["day"] else "",
            "gift": ", gift wrap" if order["gift"] else "",
        }
        return self.rng.choice(NOTES).format(**parts)

    def letter(self, order: dict, misleading: float) -> str:
        """A message in sentences, in varied order, with and without greetings."""
        inside, alone = self.details(order)
        asked = " ".join([self.draw(ASK).format(goods=self.goods(order)), *inside])
        sentences = [asked + ("?" if asked.startswith(("Can", "Could")) else "."), *alone]
        if self.maybe(0.3):
            self.rng.shuffle(sentences)
        if self.maybe(misleading):
            sentences.insert(self.rng.randrange(len(sentences) + 1), self.mislead())
        name = self.rng.choice(NAMES)
        if self.maybe(0.4):
            sentences.insert(0, self.draw(HELLO).format(name=name))
        if self.maybe(0.3):
            sentences.append(self.draw(BYE).format(name=name))
        return " ".join(sentences)

    def details(self, order: dict) -> tuple[list[str], list[str]]:
        """City, day and gift: the ones said inside the sentence that asks, and those said in one of their own."""
        inside, alone = [], []
        for key, within, apart in (("city", CITY_INSIDE, CITY_ALONE), ("day", DAY_INSIDE, DAY_ALONE)):
            if order[key]:
                here = self.maybe(0.6)
                (inside if here else alone).append(self.draw(within if here else apart).format(**{key: order[key]}))
        self.rng.shuffle(inside)
        if order["gift"]:
            here = self.maybe(0.4)
            (inside if here else alone).append(self.draw(GIFT_INSIDE if here else GIFT_ALONE))
        elif self.maybe(0.2):
            alone.append(self.draw(NO_GIFT))
        self.rng.shuffle(alone)
        return inside, alone

    def mislead(self) -> str:
        """A sentence that says nothing about this order."""
        number = self.rng.choice(["two", "3", "five", "10"])
        city, color = self.rng.choice(CITIES.common), self.rng.choice(COLORS)
        return self.draw(MISLEADING).format(number=number, city=city, color=color)


def make_row(writer: Writer, difficulty: Difficulty) -> tuple[dict, dict]:
    """One row and the order in it."""
    order = writer.order()
    text = writer.note(order) if writer.maybe(0.15) else writer.letter(order, difficulty.misleading)
    if order["city"] not in CITIES.heldout and writer.maybe(difficulty.lowercase):
        text = text.lower()
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": json.dumps(order)}]
    return {"messages": messages}, order


def make_rows(writer: Writer, count: int, difficulty: Difficulty, is_taken: Callable[[dict], bool]) -> list[dict]:
    """`count` rows with different orders, none of them taken."""
    rows: list[dict] = []
    seen: set[str] = set()
    while len(rows) < count:
        row, order = make_row(writer, difficulty)
        key = json.dumps(order)
        if key not in seen and not is_taken(order):
            seen.add(key)
            rows.append(row)
    return rows


def make_files(folder: Path, difficulty: Difficulty) -> None:
    """Write `orders.train.jsonl` and `orders.heldout.jsonl`."""
    train = make_rows(Writer(random.Random(SEED), 0.0), TRAIN_ROWS, difficulty, lambda order: False)
    answers = {row["messages"][1]["content"] for row in train}
    writer = Writer(random.Random(SEED + 1), difficulty.unseen)
    heldout = make_rows(writer, HELDOUT_ROWS, difficulty, lambda order: json.dumps(order) in answers)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("heldout", heldout)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"orders.{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")


def main() -> None:
    """Read the arguments and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent.parent / "recipes" / "data")
    parser.add_argument("--difficulty", type=int, choices=range(len(DIFFICULTIES)), default=1)
    arguments = parser.parse_args()
    make_files(arguments.folder, DIFFICULTIES[arguments.difficulty])


if __name__ == "__main__":
    main()
