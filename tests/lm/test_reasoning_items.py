"""The reasoning suite asks what it says it asks: every answer found again from the prompt alone, by other means."""

import itertools
import re
from collections import Counter, defaultdict

import pytest

from erlangen.lm.reasoning import FAMILIES, make_items
from erlangen.lm.reasoning.items import PAIRS


@pytest.fixture(scope="module")
def suite():
    return {family: make_items(family, 500)[0] for family in FAMILIES}


# Solvers, that read the prompt and know nothing of how it was made


def predictions(terms, modulus, alphabetic):
    """Brute force over the rules of docs/reasoning.md: every one is tried with every parameter that the terms allow."""

    def mod(x):
        return x % modulus if modulus else x

    found, n = set(), len(terms)
    reach = range(26) if modulus else range(-130, 131)
    for step in reach:  # a constant step
        if step and n >= 3 and all(mod(a + step) == b for a, b in itertools.pairwise(terms)):
            found.add(mod(terms[-1] + step))
    for growth in reach:  # a step that grows
        steps = [mod(b - a) for a, b in itertools.pairwise(terms)]
        if growth and n >= 4 and all(mod(a + growth) == b for a, b in itertools.pairwise(steps)):
            found.add(mod(terms[-1] + steps[-1] + growth))
    for period in (2, 3):
        if n >= 2 * period and terms == (terms[:period] * n)[:n]:
            found.add((terms[:period] * n)[n])
    if alphabetic:  # two sequences in turn, each with a step of its own
        for first, second in itertools.product(range(26), repeat=2):
            steps = first, second
            if n >= 6 and all(mod(terms[i - 2] + steps[i % 2]) == terms[i] for i in range(2, n)):
                found.add(mod(terms[-2] + steps[n % 2]))
        return found
    for up, down in itertools.product(range(1, 10), repeat=2):  # multiples
        if (up, down) != (1, 1) and n >= 3 and all(a * up == b * down for a, b in itertools.pairwise(terms)):
            found |= {terms[-1] * up // down} if terms[-1] * up % down == 0 else set()
    if n >= 4 and all(terms[i] == terms[i - 1] + terms[i - 2] for i in range(2, n)):
        found.add(terms[-1] + terms[-2])
    steps = [b - a for a, b in itertools.pairwise(terms)]
    if n >= 5 and steps == ([steps[0], steps[1]] * n)[: n - 1]:
        found.add(terms[-1] + ([steps[0], steps[1]] * n)[n - 1])
    return found


def solve_numeric(prompt):
    (found,) = predictions([int(word) for word in re.findall(r"\d+", prompt)], None, False)
    return str(found)


def solve_alphabetic(prompt):
    letters = re.findall(r"[A-Za-z]", prompt)
    first = ord("A" if letters[0].isupper() else "a")
    (found,) = predictions([ord(letter) - first for letter in letters], 26, True)
    return chr(first + found)


def solve_retrieval(prompt):
    *facts, question = re.split(r"[.,] ", prompt)
    (answer,) = (fact[len(question) :] for fact in facts if fact.startswith(question + " "))
    return answer.strip()


def solve_copy(prompt):
    shown = prompt.split()
    (following,) = {after for before, after in itertools.pairwise(shown) if before == shown[-1]}
    return following


def solve_inference(prompt):
    *premises, question = prompt.split(". ")
    if " than " in premises[0]:
        below = defaultdict(set)  # who is lower on the scale whose top is asked for
        for premise in premises:
            a, relation, b = re.fullmatch(r"(\w+) is (\w+) than (\w+)", premise).groups()
            same_pole = relation[:-2] == re.search(r"The (\w+)est is", question)[1]
            below[a if same_pole else b].add(b if same_pole else a)
        (top,) = set(below) - set().union(*below.values())
        return top
    rules, known = {}, set()
    who = re.match(r"So (\w+) is", question)[1]
    for premise in premises:
        if found := re.fullmatch(r"Every (\w+) is (?:a )?(\w+)", premise):
            rules[found[1]] = found[2]
        else:
            known.add(re.fullmatch(rf"{who} is a (\w+)", premise)[1])
    while more := {rules[fact] for fact in known if fact in rules} - known:
        known |= more
    (last,) = known - set(rules)
    return last


def solve_negation(prompt):
    if found := re.search(r"The colour of (\w+) is$", prompt):
        return re.search(rf"{found[1]} is (?!not)(\w+)\.", prompt)[1]
    if found := re.search(r"holds not a \w+ but a (\w+)\.|holds a (\w+), not a \w+\.", prompt):
        return found[1] or found[2]
    opposites = {"open": "shut", "warm": "cold", "hard": "soft", "fast": "slow"}
    opposites |= {b: a for a, b in opposites.items()}
    denied, word = re.search(r" is (not )?(\w+)\. ", prompt).groups()
    return opposites[word] if denied else word


WOMEN = {"girl", "queen", "lady", "aunt", "nun"}


def check_syntax(item):
    """Whether the grammar takes prompt and answer, and refuses the other candidate."""
    words = item.prompt.split()

    def takes(candidate):
        last = candidate.split()
        if "asked" in item.prompt:
            inverted = last[0] in ("is", "was")
            return inverted == ("asked:" in item.prompt)
        if words[0] == "We":
            many = next(word for word in words if word.startswith("th")) in ("these", "those")
            return last[0].endswith("s.") == many
        subject = words[1]
        many = subject.endswith("s") or subject == "men"
        if last[0].endswith("self"):
            return not many and (subject in WOMEN) == (last[0] == "herself")
        if last[0] == "themselves":
            return many
        return (last[0] in ("are", "were", "have", "do")) == many

    return [takes(candidate) for candidate in item.candidates]


SOLVERS = {
    "numeric": solve_numeric, "alphabetic": solve_alphabetic, "near": solve_retrieval, "far": solve_retrieval,
    "inference": solve_inference, "copy": solve_copy, "negation": solve_negation,
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answers_are_found_again_from_the_prompt(suite, family):
    for item in suite[family]:
        if family == "syntax":
            right = check_syntax(item)
            assert sum(right) == 1 and right[item.answer], item
        else:
            assert SOLVERS[family](item.prompt) == item.candidates[item.answer].strip(), item


def test_the_solvers_find_wrong_answers(suite):
    """A solver that always agreed would prove nothing: it refuses every other candidate."""
    for family, solver in SOLVERS.items():
        for item in suite[family][:50]:
            answers = [candidate.strip() for candidate in item.candidates]
            assert answers.count(solver(item.prompt)) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_items_are_distinct_closed_choices(suite, family):
    items = suite[family]
    assert len(items) >= 500 and len({item.prompt for item in items}) == len(items)
    for item in items:
        texts = item.candidates
        assert 2 <= len(texts) == len({*texts}) and all(text[0] == " " and text[1:] == text.strip() for text in texts)
        assert item.prompt == item.prompt.strip() and item.chance == 1 / len(texts)
        assert not any(a != b and a.startswith(b) for a in texts for b in texts), "one is a beginning of another"
        if family not in PAIRS:
            assert len({*map(len, texts)}) == 1, "candidates of one length"


def test_the_seed_decides(suite):
    assert make_items("copy", 500)[0] == suite["copy"]
    other = make_items("copy", 500, seed=1)[0]
    assert len({item.prompt for item in other} & {item.prompt for item in suite["copy"]}) < 50


@pytest.mark.parametrize("family", PAIRS)
def test_what_ignores_the_prompt_scores_one_half_in_every_block(suite, family):
    """Whatever prefers one continuation, by length, frequency or place: each is right as often as the other."""
    blocks = defaultdict(list)
    for item in suite[family]:
        blocks[item.block].append(item)
    for items in blocks.values():
        assert len({item.candidates for item in items}) == 1
        assert sum(item.answer for item in items) * 2 == len(items)


@pytest.mark.parametrize("kind", ["agreement", "relative clause", "reflexive number", "reflexive gender"])
def test_the_nearest_noun_says_nothing(suite, kind):
    """A scorer that reads the last words only, whatever it makes of them: both answers follow them equally often."""
    counts = defaultdict(Counter)
    for item in suite["syntax"]:
        if item.kind == kind:
            tail = tuple(item.prompt.split()[2:])
            counts[item.block, tail][item.candidates[item.answer]] += 1
    assert counts and all(len(found) == 2 and len({*found.values()}) == 1 for found in counts.values())


def test_the_word_named_last_or_first_is_no_answer_to_a_negation(suite):
    for pick in (min, max):
        hits = [
            pick((0, 1), key=lambda i, item=item: f" {item.prompt}".rfind(item.candidates[i])) == item.answer
            for item in suite["negation"]
        ]
        assert sum(hits) * 2 == pytest.approx(len(hits), abs=2)


@pytest.mark.parametrize("family", ["near", "far", "inference"])
def test_no_place_in_the_prompt_is_favoured(suite, family):
    """The first and the last candidate named are right at the rate of chance, within four standard errors."""
    items = suite[family]
    for pick in (min, max):
        hits = sum(
            pick(range(len(item.candidates)), key=lambda i, item=item: f" {item.prompt}".rfind(item.candidates[i]))
            == item.answer
            for item in items
        )
        chance = sum(item.chance for item in items)
        assert abs(hits - chance) < 4 * sum(item.chance * (1 - item.chance) for item in items) ** 0.5


def test_short_contexts_get_short_items_and_a_reason_when_there_are_none():
    def fits(item):
        return max(len(item.prompt + text) for text in item.candidates) <= 100

    items, too_long = make_items("far", 100, fits=fits)
    assert too_long > 0 and {item.parameters["distance"] for item in items} <= {1, 2, 4} and all(map(fits, items))
    with pytest.raises(ValueError, match="longer context"):
        make_items("far", 100, fits=lambda item: len(item.prompt) < 40)
    with pytest.raises(ValueError, match="choose among numeric"):
        make_items("logic")
    with pytest.raises(ValueError, match="at least 1"):
        make_items("copy", 0)
