"""Write the data of the recipes beside the quickstart's: texts for stage pt, pairs for stage rm, Chinese for the walk.

    python scripts/make_recipe_data.py [--folder recipes/data]

    orders.texts.jsonl   {"text"}: a shop's day book, one day a row
    orders.pairs.jsonl   {"prompt", "chosen", "rejected"}: the right record of an order, and one with a mistake in it
    chinese.json         instruction, input, output: numbers, days and sums in Chinese characters

The same arguments always write the same files. They are made from `orders.train.jsonl`.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

SEED = 4
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
DIGITS = "零一二三四五六七八九"
ORDERS_PER_DAY = 6


def main() -> None:
    """Write all three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("recipes/data"))
    folder = parser.parse_args().folder
    lines = (folder / "orders.train.jsonl").read_text(encoding="utf-8").splitlines()
    orders = [tuple(turn["content"] for turn in json.loads(line)["messages"]) for line in lines]
    write_lines(folder / "orders.texts.jsonl", day_book(orders))
    write_lines(folder / "orders.pairs.jsonl", pairs(orders))
    rows = json.dumps(chinese(), ensure_ascii=False, indent=1)
    (folder / "chinese.json").write_text(rows + "\n", encoding="utf-8")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def day_book(orders: list[tuple[str, str]]) -> list[dict[str, str]]:
    """What the shop wrote down on each day."""
    days = []
    for number, start in enumerate(range(0, len(orders), ORDERS_PER_DAY)):
        entries = [entry(message, json.loads(record)) for message, record in orders[start : start + ORDERS_PER_DAY]]
        days.append({"text": f"Day book, {DAYS[number % 7]} of week {number // 7 + 1}.\n" + "\n".join(entries)})
    return days


def entry(message: str, order: dict[str, Any]) -> str:
    """A customer's words and what was packed."""
    color = f"{order['color']} " if order["color"] else ""
    noun = order["item"] if order["quantity"] == 1 else f"{order['item']}s"
    where = f" for {order['city']}" if order["city"] else ""
    return f'A customer wrote: "{message}" We packed {order["quantity"]} {color}{noun}{where}.'


def pairs(orders: list[tuple[str, str]]) -> list[dict[str, str]]:
    """The right record, and one that a careless clerk would write."""
    rng = random.Random(SEED)
    found = []
    for message, record in orders[:240]:
        wrong = spoiled(json.loads(record), rng)
        found.append({"prompt": message, "chosen": record, "rejected": wrong})
    return found


def spoiled(order: dict[str, Any], rng: random.Random) -> str:
    """The order with one mistake: a wrong number, a wrong thing, words in place of the record."""
    kind = rng.choice(["quantity", "item", "words", "gift"])
    if kind == "words":
        return f"Sure! You would like {order['quantity']} {order['item']}. I will see what I can do."
    if kind == "quantity":
        order["quantity"] += rng.choice([1, 2, 5])
    elif kind == "item":
        order["item"] = "parcel"
    else:
        order["gift"] = not order["gift"]
    return json.dumps(order)


def chinese() -> list[dict[str, str]]:
    """Three kinds of exercises, in a fixed mixture."""
    rng = random.Random(SEED)
    rows = []
    for _ in range(300):
        kind, number, other = rng.randrange(3), rng.randrange(10, 100), rng.randrange(1, 10)
        if kind == 0:
            rows.append(exercise("把数字写成中文。", str(number), in_characters(number)))
        elif kind == 1:
            rows.append(exercise("把中文数字写成阿拉伯数字。", in_characters(number), str(number)))
        else:
            answer = f"{in_characters(number)}加{in_characters(other)}等于{in_characters(number + other)}。"
            rows.append(exercise(f"{in_characters(number)}加{in_characters(other)}等于多少？", "", answer))
    return rows


def exercise(instruction: str, given: str, answer: str) -> dict[str, str]:
    """A row with Alpaca's columns."""
    return {"instruction": instruction, "input": given, "output": answer}


def in_characters(number: int) -> str:
    """A number below 200 in Chinese characters.

    >>> in_characters(10), in_characters(25), in_characters(105)
    ('十', '二十五', '一百零五')
    """
    if number >= 100:
        rest = number - 100
        return "一百" + (("零" if rest < 10 else "一" if rest < 20 else "") + in_characters(rest) if rest else "")
    tens, ones = divmod(number, 10)
    return (DIGITS[tens] if tens > 1 else "") + ("十" if tens else "") + (DIGITS[ones] if ones or not tens else "")


if __name__ == "__main__":
    main()
