"""The text that the demo model learns from: stories, questions, and passages to copy, complete or rewrite.

Everything is made from templates and word lists by one seeded random generator: the same seed gives the same documents.
A template such as ``"{A} [ran|walked] {to}[ after lunch|]."`` is expanded in two steps. First each bracket becomes one
of its alternatives, which gives the sentence's *shape*; then the slots are filled from a *world* (who, where, with
what), which is drawn once for each document, so that the hero stays the hero and the place stays the place. Copying
tasks draw names and words that are made up on the spot, so that they can only be solved by looking at the prompt.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from demo_stories import FILLERS, MACROS, ONCE_UPON_A_TIME, OTHER_OPENINGS, PLOTS, TRAITS, WEATHER, Plot

KIND_SHARES = {"story": 0.34, "question": 0.30, "repeat": 0.24, "complete": 0.12}
LONGER_SHARES = {"story": 0.22, "question": 0.14, "repeat": 0.16, "complete": 0.08, "recite": 0.2, "rewrite": 0.2}
KINDS = tuple(LONGER_SHARES)

GIRLS = (
    "Mia", "Lily", "Anna", "Zoe", "Emma", "Nora", "Ella", "Ruby", "Ivy", "Clara", "Rosa", "Maya", "Lucy", "Alice",
    "Sara", "Nina", "Tara", "Hana", "Wren", "Poppy", "Julia", "Molly",
)  # fmt: skip
BOYS = (
    "Tom", "Ben", "Max", "Leo", "Sam", "Jack", "Finn", "Noah", "Omar", "Luca", "Hugo", "Theo", "Eli", "Oscar", "Ravi",
    "Felix", "Peter", "Kofi", "Dan", "Milo", "Simon", "Paul",
)  # fmt: skip
PEOPLE = ("little girl", "young girl", "cheerful girl"), ("little boy", "young boy", "cheerful boy")
ANIMALS = (
    "fox",
    "rabbit",
    "bear",
    "mouse",
    "hedgehog",
    "duck",
    "squirrel",
    "owl",
    "frog",
    "cat",
    "goat",
    "otter",
    "turtle",
    "pony",
)
ANIMAL_SIZES = ("little", "small", "young", "tiny", "fluffy")
PETS = ("kitten", "puppy", "bird", "lamb", "duckling", "rabbit", "hedgehog", "turtle", "squirrel", "goose")
COLORS = (
    "red",
    "blue",
    "green",
    "yellow",
    "purple",
    "orange",
    "pink",
    "white",
    "black",
    "brown",
    "silver",
    "golden",
    "grey",
)
LOOKS = (
    "big",
    "small",
    "old",
    "new",
    "round",
    "shiny",
    "soft",
    "tiny",
    "heavy",
    "lovely",
    "warm",
    "strange",
    "pretty",
    "wooden",
)
THINGS = (
    "kite", "ball", "drum", "boat", "hat", "book", "bell", "lamp", "basket", "scarf", "cup", "doll", "puzzle",
    "whistle", "blanket", "shell", "ring", "key", "wagon", "umbrella", "box", "stone", "flute", "mirror", "feather",
    "ribbon", "coat", "spoon", "bucket", "rope", "mask", "map", "pencil", "pillow", "candle", "button", "clock",
    "apron", "bag", "train",
)  # fmt: skip
FOODS = (
    "apple pie",
    "soup",
    "bread",
    "cake",
    "rice",
    "porridge",
    "cheese",
    "jam",
    "salad",
    "stew",
    "pudding",
    "butter",
)
COUNTED = (
    "apples",
    "pears",
    "shells",
    "books",
    "marbles",
    "stones",
    "eggs",
    "nuts",
    "buttons",
    "flowers",
    "coins",
    "cups",
    "plums",
)
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
PLACES = (
    ("in", "garden"), ("in", "park"), ("on", "beach"), ("by", "river"), ("in", "forest"), ("on", "hill"),
    ("by", "lake"), ("at", "market"), ("in", "meadow"), ("on", "farm"), ("at", "playground"), ("near", "bridge"),
    ("by", "pond"), ("in", "orchard"), ("in", "field"), ("near", "old mill"), ("at", "harbor"), ("by", "fountain"),
    ("in", "valley"), ("near", "tower"),
)  # fmt: skip
ROOMS = (
    ("in", "kitchen"),
    ("in", "attic"),
    ("in", "barn"),
    ("at", "school"),
    ("in", "library"),
    ("at", "bakery"),
    ("in", "cellar"),
)
SPOTS = (
    "under a bench", "behind a big rock", "in the tall grass", "behind a bush", "under an old tree", "beside the fence",
    "near the gate", "beside a wall", "under a pile of leaves", "between two stones", "behind a log",
    "behind the hedge", "next to the path",
)  # fmt: skip
HOBBIES = (
    "run in the grass", "draw pictures", "sing songs", "count the clouds", "climb trees", "read books",
    "dance in the rain", "pick flowers", "look at the stars", "jump over puddles", "build little houses",
    "feed the birds", "tell jokes", "collect leaves", "bake bread",
)  # fmt: skip
GOOD_TRAITS = (
    "kind",
    "brave",
    "curious",
    "cheerful",
    "gentle",
    "clever",
    "friendly",
    "careful",
    "honest",
    "helpful",
    "patient",
    "playful",
)
DAYS = tuple(
    f"{look} {part}"
    for look in ("sunny", "warm", "cool", "bright", "quiet", "windy")
    for part in ("morning", "afternoon", "day")
)
TIMES = (
    "in the morning", "in the afternoon", "in the evening", "after lunch", "before dinner", "on Monday", "on Tuesday",
    "on Wednesday", "on Thursday", "on Friday", "on Saturday", "on Sunday", "at noon", "at night", "before school",
    "after the rain",
)  # fmt: skip
FAMILY = {"girl": ("mother", "grandmother", "sister", "aunt"), "boy": ("father", "grandfather", "brother", "uncle")}
PRONOUNS = {"girl": ("she", "her", "her"), "boy": ("he", "him", "his")}
PAST_AND_BASE = (
    ("found", "find"), ("saw", "see"), ("hid", "hide"), ("left", "leave"), ("dropped", "drop"), ("put", "put"),
    ("painted", "paint"), ("lost", "lose"), ("washed", "wash"), ("fixed", "fix"), ("cleaned", "clean"),
    ("bought", "buy"), ("forgot", "forget"), ("made", "make"), ("kept", "keep"), ("broke", "break"), ("held", "hold"),
    ("drew", "draw"), ("picked up", "pick up"), ("noticed", "notice"), ("sold", "sell"), ("wrapped", "wrap"),
    ("used", "use"), ("carried", "carry"), ("borrowed", "borrow"),
)  # fmt: skip
ATE_AND_EAT = (
    ("ate", "eat"),
    ("cooked", "cook"),
    ("tasted", "taste"),
    ("shared", "share"),
    ("wanted", "want"),
    ("smelled", "smell"),
)
WHY = (
    (
        "sad",
        ("{he} had lost {his} {thing}", "the {thing} was broken", "{his} friend was ill", "it was time to go home"),
    ),
    ("happy", ("{he} had a new {thing}", "the sun was shining", "{his} {kin} came to visit", "{he} had won the race")),
    (
        "tired",
        ("{he} had walked all day", "{he} had carried the {thing} home", "it was very late", "{he} had not slept well"),
    ),
    (
        "angry",
        ("somebody took the {thing}", "nobody would listen", "the {thing} was gone", "{his} {kin} forgot the {thing}"),
    ),
    ("scared", ("it was very dark", "there was a loud noise", "{he} was all alone", "the wind was so strong")),
    (
        "proud",
        (
            "{he} had made the {thing}",
            "{he} had helped {his} {kin}",
            "{he} could read the whole book",
            "{he} had told the truth",
        ),
    ),
    (
        "hungry",
        (
            "{he} had not eaten",
            "there was no {food} left",
            "{he} had played all morning",
            "{his} {kin} was still cooking",
        ),
    ),
)
ONSETS = (
    "b", "bl", "br", "d", "dr", "f", "fl", "g", "gr", "h", "j", "k", "kl", "l", "m", "n", "p", "pl", "r", "s", "sh",
    "sk", "st", "t", "tr", "v", "w", "y", "z",
)  # fmt: skip
VOWELS = (
    "a", "e", "i", "o", "u", "a", "e", "i", "o", "u", "ee", "oo", "ai",
)  # fmt: skip
CODAS = (
    "b", "ck", "d", "f", "g", "k", "l", "ll", "m", "n", "nd", "p", "r", "rn", "s", "sh", "st", "t", "x", "z", *[""] * 8,
)  # fmt: skip

INNERMOST = re.compile(r"\[([^\[\]]*)\]")
SENTENCE_START = re.compile(r'((?:^|[.!?] )"?)([a-z])')


@dataclass(frozen=True)
class Document:
    """One text, and where to cut it for a test.

    ``text`` starts with ``prompt + answer``; greedy decoding of the prompt should give the answer. A story has neither.
    """

    kind: str
    text: str
    prompt: str = ""
    answer: str = ""


@dataclass(frozen=True)
class Fact:
    """A sentence and the question-answer pairs that it settles."""

    sentence: str
    pairs: tuple[tuple[str, str], ...]


def article(words: str) -> str:
    """Put ``a`` or ``an`` before words, by their first letter, which is right for every listed word."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def capital(text: str) -> str:
    """The text with the first letter of each sentence, quoted or not, as a capital."""
    return SENTENCE_START.sub(lambda found: found[1] + found[2].upper(), text)


class TextMaker:
    """A seeded source of documents without end.

    Args:
        seed: of everything.
        shares: how often each kind of document comes.

    Attributes:
        shapes: every distinct sentence shape written so far: templates with their alternatives chosen and their slots
            open.
    """

    def __init__(self, seed: int, shares: Mapping[str, float] = KIND_SHARES) -> None:
        self.rng = random.Random(seed)
        self.shapes: set[str] = set()
        self._shares = dict(shares)
        self._makers: dict[str, Callable[[], Document]] = {
            "story": self.story,
            "question": self.question,
            "repeat": self.repeat,
            "complete": self.complete,
            "recite": self.recite,
            "rewrite": self.rewrite,
        }

    def document(self) -> Document:
        """The next document, its kind drawn by the fixed shares."""
        return self.of_kind(self.rng.choices(tuple(self._shares), tuple(self._shares.values()))[0])

    def of_kind(self, kind: str) -> Document:
        """The next document of one kind."""
        return self._makers[kind]()

    # ---- words and worlds

    def made_word(self, syllables: int) -> str:
        """A word that does not exist, so that it can only be copied."""
        parts = [self.rng.choice(ONSETS) + self.rng.choice(VOWELS) for _ in range(syllables)]
        return "".join(parts) + self.rng.choice(CODAS)

    def name(self, gender: str, made: float) -> str:
        """A name: with probability ``made`` one that is made up."""
        if self.rng.random() < made:
            return self.made_word(self.rng.choice((1, 2, 2, 3))).capitalize()
        return self.rng.choice(GIRLS if gender == "girl" else BOYS)

    def noun(self, made: float) -> str:
        """A thing: with probability ``made`` one that is made up."""
        return self.made_word(self.rng.choice((1, 2))) if self.rng.random() < made else self.rng.choice(THINGS)

    def names(self, count: int, made: float) -> list[tuple[str, str]]:
        """Different names with their genders."""
        found: dict[str, str] = {}
        while len(found) < count:
            gender = self.rng.choice(("girl", "boy"))
            found.setdefault(self.name(gender, made), gender)
        return list(found.items())

    def objects(self, count: int, made: float) -> list[tuple[str, str]]:
        """Different nouns, each with an adjective that is its own within the document."""
        nouns: dict[str, None] = {}
        while len(nouns) < count:
            nouns[self.noun(made)] = None
        return list(zip(self.rng.sample(COLORS + LOOKS, count), nouns, strict=True))

    @staticmethod
    def located(place: tuple[str, str]) -> tuple[str, str]:
        """Where something is ("in the park"), and the place itself ("the park")."""
        preposition, noun = place
        the = noun if noun == "school" else f"the {noun}"
        return f"{preposition} {the}", the

    def world(self) -> dict[str, str]:
        """Who, where and with what: drawn once for a story, and the same in all its sentences."""
        (hero, gender), (friend, friend_gender) = self.names(2, made=0.2)
        if self.rng.random() < 0.6:  # two genders keep "he" and "she" apart
            friend_gender = "boy" if gender == "girl" else "girl"
            friend = self.rng.choice([n for n in (GIRLS if friend_gender == "girl" else BOYS) if n != hero])
        animals = self.rng.random() < 0.35
        kinds = self._kinds(animals, gender, friend_gender)
        (look, thing), (look2, thing2) = self.objects(2, made=0.0)
        (place, the_place), (_, home) = (self.located(spot) for spot in self.rng.sample(PLACES, 2))
        elder = self.rng.choice(("girl", "boy"))
        spots = self.rng.sample(SPOTS, 3)
        world = {
            "A": hero,
            "B": friend,
            "kind": kinds[0],
            "bkind": kinds[1],
            "role": "neighbor" if animals else "friend",
        }
        world |= self._pronouns("", gender) | self._pronouns("b", friend_gender) | self._pronouns("g", elder)
        world |= {"obj": f"{look} {thing}", "thing": thing, "obj2": f"{look2} {thing2}", "thing2": thing2}
        world |= {"place": place, "home": home, "to": f"to {the_place}", "the_place": the_place}
        world |= {"spot": spots[0], "spot2": spots[1], "spot3": spots[2], "kin": self.rng.choice(FAMILY[elder])}
        world |= {
            "pet": self.rng.choice([p for p in PETS if p not in kinds[0] and p not in kinds[1]]),
            "food": self.rng.choice(FOODS),
        }
        world |= {
            "hobby": self.rng.choice(HOBBIES),
            "trait": self.rng.choice(GOOD_TRAITS),
            "day": self.rng.choice(DAYS),
        }
        world |= {"count": self.rng.choice(NUMBERS), "many": self.rng.choice(COUNTED)}
        return world | {f"a_{key}": article(world[key]) for key in ("kind", "bkind", "obj", "obj2", "pet", "thing")}

    def _kinds(self, animals: bool, gender: str, friend_gender: str) -> tuple[str, str]:
        if animals:
            first, second = self.rng.sample(ANIMALS, 2)
            return f"{self.rng.choice(ANIMAL_SIZES)} {first}", second
        return self.rng.choice(PEOPLE[gender == "boy"]), friend_gender

    @staticmethod
    def _pronouns(prefix: str, gender: str) -> dict[str, str]:
        he, him, his = PRONOUNS[gender]
        return {f"{prefix}he": he, f"{prefix}him": him, f"{prefix}his": his}

    # ---- sentences

    def shape(self, template: str) -> str:
        """Choose every alternative of a template, innermost brackets first."""
        for macro, bracket in MACROS.items():
            template = template.replace(macro, bracket)
        while "[" in template:
            template = INNERMOST.sub(lambda found: self.rng.choice(found[1].split("|")), template)
        self.shapes.add(template)
        return template

    def say(self, templates: str | Sequence[str], world: dict[str, str]) -> str:
        """One sentence: a template of those given, its shape chosen and its slots filled."""
        template = templates if isinstance(templates, str) else self.rng.choice(templates)
        return capital(self.shape(template).format_map(world)) if template else ""

    def fact_text(self, world: dict[str, str], statement: str, *pairs: tuple[str, str]) -> Fact:
        """A fact from templates that share one world."""
        return Fact(self.say(statement, world), tuple((self.say(q, world), self.say(a, world)) for q, a in pairs))

    # ---- stories

    def tell(self, plot: Plot, world: dict[str, str]) -> list[str]:
        """A story's sentences."""
        opening = self.say(ONCE_UPON_A_TIME if self.rng.random() < 0.55 else OTHER_OPENINGS, world)
        beats = [self.say(beat, world) for beat in plot.beats]
        if plot.weather:
            beats.insert(1, self.say(WEATHER, world))
        return [s for s in (opening, self.say(TRAITS, world), *beats, self.say(plot.endings, world)) if s]

    def story(self) -> Document:
        """A little story about one hero."""
        return Document("story", " ".join(self.tell(self.rng.choice(PLOTS), self.world())))

    # ---- questions about a passage

    def question(self) -> Document:
        """A passage, and one or more questions that it answers."""
        passage, pairs = self._story_passage() if self.rng.random() < 0.2 else self._fact_passage()
        self.rng.shuffle(pairs)
        line = "\n" if self.rng.random() < 0.75 else " "
        count = 1
        while (
            count < min(4, len(pairs)) and self.rng.random() < 0.42
        ):  # below a half, so that stopping is always likelier
            count += 1
        asked = "".join(f"{line}Question: {q} Answer: {a}" for q, a in pairs[:count])
        prompt = f"{passage}{line}Question: {pairs[0][0]} Answer:"
        return Document("question", passage + asked, prompt, " " + pairs[0][1])

    def _story_passage(self) -> tuple[str, list[tuple[str, str]]]:
        plot, world = self.rng.choice(PLOTS), self.world()
        sentences = self.tell(plot, world)
        pairs = [(self.say(q, world), self.say(a, world)) for q, a in plot.pairs]
        return " ".join(sentences), [
            *pairs,
            (self.say("Who is the story about?", world), self.say("The story is about {A}.", world)),
        ]

    def _fact_passage(self) -> tuple[str, list[tuple[str, str]]]:
        facts = self.facts(self.rng.randint(1, 5))
        sentences = [fact.sentence for fact in facts]
        if self.rng.random() < 0.35:
            sentences.insert(self.rng.randint(0, len(sentences)), self.say(FILLERS, {}))
        return " ".join(sentences), [pair for fact in facts for pair in fact.pairs]

    def facts(self, count: int) -> list[Fact]:
        """Facts about different people and different things, so that every question has one answer."""
        people = self.names(2 * count, made=0.45)
        things = self.objects(count, made=0.2)
        places = self.rng.sample(PLACES + ROOMS, count)
        times = self.rng.sample(TIMES, count)
        pets = self.rng.sample(PETS, count)
        others = (self._gave, self._felt, self._had, self._went, self._pet, self._color, self._ate)
        found = []
        for i, (look, thing) in enumerate(things):
            (who, gender), (other, _) = people[2 * i], people[2 * i + 1]
            place, the = self.located(places[i])
            world = {
                "A": who,
                "B": other,
                "obj": f"{look} {thing}",
                "thing": thing,
                "a_obj": article(f"{look} {thing}"),
            }
            world |= {"place": place, "to": f"to {the}", "time": times[i], "look": look, "pet": pets[i]}
            world |= self._pronouns("", gender) | {"food": self.rng.choice(FOODS), "number": self.rng.choice(NUMBERS)}
            world |= {
                "many": self.rng.choice(COUNTED),
                "kin": self.rng.choice(FAMILY["girl"] + FAMILY["boy"]),
                "a_pet": article(pets[i]),
            }
            maker = self._did if self.rng.random() < 0.36 else self.rng.choice(others)
            found.append(maker(world))
        return found

    def _did(self, world: dict[str, str]) -> Fact:
        """Somebody did something to a thing, somewhere: the workhorse."""
        past, base = self.rng.choice(PAST_AND_BASE)
        statement, timed = self.rng.choice(
            (
                (f"{{A}} {past} {{a_obj}} {{place}}.", False),
                (f"{{A}} {past} {{a_obj}} {{place}} {{time}}.", True),
                (f"{{time}}, {{A}} {past} {{a_obj}} {{place}}.", True),
                (f"{{place}}, {{A}} {past} {{a_obj}}.", False),
                (f"{{place}}, {{A}} {past} {{a_obj}} {{time}}.", True),
                (f"{{A}} [went {{to}} and|was {{place}} and] {past} {{a_obj}} there.", False),
                (f"{{A}} {past} {{a_obj}} [while|when] {{he}} was {{place}}.", False),
                (f"{{A}} and {{his}} {{kin}} were {{place}} when {{A}} {past} {{a_obj}}.", False),
                (f"It was {{A}} who {past} {{a_obj}} {{place}}.", False),
            )
        )
        pairs = [
            (f"Where did {{A}} {base} the {{obj}}?", f"{{A}} {past} the {{obj}} {{place}}."),
            (f"Who {past} the {{obj}}?", f"{{A}} {past} the {{obj}}."),
            (f"What did {{A}} {base} {{place}}?", f"{{A}} {past} {{a_obj}} {{place}}."),
            (f"What did {{A}} {base}?", f"{{A}} {past} {{a_obj}}."),
        ]
        if timed:
            pairs.append((f"When did {{A}} {base} the {{obj}}?", f"{{A}} {past} the {{obj}} {{time}}."))
        if world["look"] in COLORS:
            pairs.append(("What color was the {thing}?", "The {thing} was {look}."))
        return self.fact_text(world, statement, *pairs)

    def _gave(self, world: dict[str, str]) -> Fact:
        past, base = self.rng.choice(
            (("gave", "give"), ("showed", "show"), ("sold", "sell"), ("handed", "hand"), ("brought", "bring"))
        )
        return self.fact_text(
            world,
            f"[{{time}}, |]{{A}} {past} {{a_obj}} to {{B}}[ {{place}}|].",
            (f"Who did {{A}} {base} the {{obj}} to?", f"{{A}} {past} the {{obj}} to {{B}}."),
            (f"What did {{A}} {base} to {{B}}?", f"{{A}} {past} {{a_obj}} to {{B}}."),
            (f"Who {past} the {{obj}} to {{B}}?", f"{{A}} {past} the {{obj}} to {{B}}."),
        )

    def _felt(self, world: dict[str, str]) -> Fact:
        feeling, reasons = self.rng.choice(WHY)
        reason = self.rng.choice(reasons)
        return self.fact_text(
            world,
            f"{{A}} was [very |]{feeling} because {reason}.",
            (f"Why was {{A}} {feeling}?", f"{{A}} was {feeling} because {reason}."),
            ("How did {A} feel?", f"{{A}} felt {feeling}."),
        )

    def _had(self, world: dict[str, str]) -> Fact:
        past, base = self.rng.choice(
            (("had", "have"), ("found", "find"), ("counted", "count"), ("bought", "buy"), ("needed", "need"))
        )
        return self.fact_text(
            world,
            f"[{{time}}, |]{{A}} {past} {{number}} {{many}}[ {{place}}|].",
            (f"How many {{many}} did {{A}} {base}?", f"{{A}} {past} {{number}} {{many}}."),
            (f"Who {past} {{number}} {{many}}?", f"{{A}} {past} {{number}} {{many}}."),
        )

    def _went(self, world: dict[str, str]) -> Fact:
        past, base = self.rng.choice(
            (("went", "go"), ("walked", "walk"), ("ran", "run"), ("rode", "ride"), ("hurried", "hurry"))
        )
        return self.fact_text(
            world,
            f"[{{time}}, {{A}} {past} {{to}} with {{B}}|{{A}} {past} {{to}} with {{B}}[ {{time}}|]].",
            (f"Where did {{A}} {base}?", f"{{A}} {past} {{to}}."),
            (f"Who {past} {{to}} with {{B}}?", f"{{A}} {past} {{to}} with {{B}}."),
            (f"Who did {{A}} {base} {{to}} with?", f"{{A}} {past} {{to}} with {{B}}."),
        )

    def _pet(self, world: dict[str, str]) -> Fact:
        return self.fact_text(
            world,
            "{A} had {a_pet} [named|called] {B}[ that slept {place}| and loved it|].",
            ("What was the name of the {pet}?", "The name of the {pet} was {B}."),
            ("Who had {a_pet}?", "{A} had {a_pet}."),
            ("What kind of animal was {B}?", "{B} was {a_pet}."),
        )

    def _color(self, world: dict[str, str]) -> Fact:
        world = world | {"look": self.rng.choice(COLORS), "a_thing": article(world["thing"])}
        return self.fact_text(
            world,
            "[{A} had {a_thing}, and it was {look}|The {thing} of {A} was {look}|"
            "{A} chose the {look} {thing}[ {time}|]].",
            ("What color was the {thing}?", "The {thing} was {look}."),
            ("Whose {thing} was {look}?", "The {thing} of {A} was {look}."),
        )

    def _ate(self, world: dict[str, str]) -> Fact:
        past, base = self.rng.choice(ATE_AND_EAT)
        return self.fact_text(
            world,
            f"[{{time}}, |]{{A}} {past} [some |the |]{{food}}[ with {{B}}|][ {{place}}|].",
            (f"What did {{A}} {base}?", f"{{A}} {past} {{food}}."),
            (f"Who {past} {{food}}?", f"{{A}} {past} {{food}}."),
        )

    # ---- repeating and completing

    def repeat(self) -> Document:
        """Something to be copied, word for word."""
        first, second = self.rng.choice(
            (("Repeat", "Copy"), ("Repeat", "Copy"), ("Repeat", "Copy"), ("List", "Again"), ("Say", "Echo"))
        )
        passage = self._list() if first == "List" else self._passage()
        line = "\n" if self.rng.random() < 0.8 else " "
        prompt = f"{first}: {passage}{line}{second}:"
        return Document("repeat", f"{prompt} {passage}", prompt, f" {passage}")

    def _passage(self) -> str:
        makers = (
            self._words,
            self._words,
            self._sentences,
            self._sentences,
            self._sentences,
            self._list,
            self._digits,
            self._gibberish,
        )
        return self.rng.choice(makers)()

    def _words(self) -> str:
        pool = [
            *THINGS,
            *COLORS,
            *LOOKS,
            *GOOD_TRAITS,
            *NUMBERS,
            *ANIMALS,
            *GIRLS,
            *BOYS,
            "the",
            "and",
            "of",
            "to",
            "was",
            "in",
            "she",
            "he",
        ]
        words = [
            self.rng.choice(pool) if self.rng.random() < 0.8 else self.made_word(1)
            for _ in range(self.rng.randint(3, 24))
        ]
        return " ".join(words) + self.rng.choice((".", "", "!"))

    def _sentences(self) -> str:
        if self.rng.random() < 0.5:
            return " ".join(fact.sentence for fact in self.facts(self.rng.randint(1, 4)))
        sentences = self.tell(self.rng.choice(PLOTS), self.world())
        start = self.rng.randrange(len(sentences) - 1)
        return " ".join(sentences[start : start + self.rng.randint(1, 4)])

    def _list(self) -> str:
        count = self.rng.randint(3, 12)
        source = self.rng.choice(
            (
                lambda: self.noun(0.3),
                lambda: self.name("girl", 0.5),
                lambda: self.rng.choice(COLORS),
                lambda: self.made_word(2),
            )
        )
        return ", ".join(source() for _ in range(count))

    def _digits(self) -> str:
        return " ".join(str(self.rng.randint(0, 10 ** self.rng.randint(1, 3))) for _ in range(self.rng.randint(3, 12)))

    def _gibberish(self) -> str:
        return " ".join(self.made_word(self.rng.randint(1, 3)) for _ in range(self.rng.randint(3, 14)))

    def complete(self) -> Document:
        """A sentence to be completed by what stands before it."""
        return self._complete_text() if self.rng.random() < 0.4 else self._complete_pairs()

    def _complete_text(self) -> Document:
        words = self._passage().split(" ")
        while len(words) < 4:
            words = self._passage().split(" ")
        cut = self.rng.randint(1, len(words) - 2)
        start, rest = " ".join(words[:cut]), " ".join(words[cut:])
        line = "\n" if self.rng.random() < 0.8 else " "
        prompt = f"Text: {start} {rest}{line}Complete: {start}"
        return Document("complete", f"{prompt} {rest}", prompt, f" {rest}")

    def _complete_pairs(self) -> Document:
        """Several sentences of one pattern, and then some of them again in another order."""
        count = self.rng.randint(2, 7)
        world = [
            {
                "A": name,
                "a_obj": article(f"{look} {thing}"),
                "place": self.located(self.rng.choice(PLACES + ROOMS))[0],
                "look": self.rng.choice(COLORS),
                "n": str(i),
            }
            for i, ((name, _), (look, thing)) in enumerate(
                zip(self.names(count, 0.5), self.objects(count, 0.25), strict=True)
            )
        ]
        head, tail = self.rng.choice(
            (("{A} has", " {a_obj}."), ("{A} is", " {place}."), ("{A} likes", " {look}."), ("{A} wants", " {a_obj}."))
        )
        given = " ".join(self.say(head + tail, w) for w in world)
        asked = self.rng.sample(world, self.rng.randint(1, count))
        line = "\n" if self.rng.random() < 0.8 else " "
        text = f"Remember: {given}" + "".join(f"{line}Complete: {(head + tail).format_map(w)}" for w in asked)
        prompt = f"Remember: {given}{line}Complete: {head.format_map(asked[0])}"
        return Document("complete", text, prompt, tail.format_map(asked[0]))

    # ---- long passages, repeated or with edits

    def recite(self) -> Document:
        """A long passage to be copied, word for word."""
        passage = " ".join(self._long_passage(self.world()))
        prompt = f"Repeat: {passage}\nCopy:"
        return Document("recite", f"{prompt} {passage}", prompt, f" {passage}")

    def rewrite(self) -> Document:
        """A long passage, and the same with a name or a thing changed, or without its middle."""
        world = self.world()
        sentences = self._long_passage(world)
        if self.rng.random() < 0.25:
            prompt, rest = f"Shorten: {' '.join(sentences)}\nShort:", f" {sentences[0]} {sentences[-1]}"
            return Document("rewrite", prompt + rest, prompt, rest)
        old, choices = self.rng.choice(((world["A"], GIRLS + BOYS), (world["thing"], THINGS)))
        new = self.rng.choice([word for word in choices if word not in (world["A"], world["B"], world["thing"])])
        passage = " ".join(sentences)
        prompt = f"Change {old} to {new}: {passage}\nChanged:"
        rest = " " + re.sub(rf"\b{old}\b", new, passage)
        return Document("rewrite", prompt + rest, prompt, rest)

    def _long_passage(self, world: dict[str, str]) -> list[str]:
        """Several sentences of one story."""
        sentences = self.tell(self.rng.choice(PLOTS), world)
        count = self.rng.randint(3, 8)
        start = self.rng.randint(0, max(len(sentences) - count, 0))
        return sentences[start : start + count]


def count_shapes(seed: int, documents: int, shares: Mapping[str, float] = KIND_SHARES) -> int:
    """Count the distinct sentence shapes in so many documents.

    A shape is a wording with its names, things and places left open.
    """
    maker = TextMaker(seed, shares)
    for _ in range(documents):
        maker.document()
    return len(maker.shapes)
