"""Words that questions are made of; those of one pool have one length, so that none is favoured by its length."""

_WORDS = """
bad bag ban bed beg ben bib big bin bob bog box bud bug bun dab dam dan den did dig dim din dip dog don dub dud
dug fab fad fag fan fap fed fib fig fin fix fog fox fun gab gag gap gem gig god gum gun ken kid kim kin lab lad
lag lap lax led leg lib lid lip lop lox lug mad man map max med meg men mid mix mob mod mom mop mud mug mum nab
nag nap net nix nob nod nub nun pad pan pap peg pen pep pig pin pod pop pox pub pug pun pup rag ran rap red rep
rev rex rib rid rig rim rip rob rod ron rub rug rum run sad sag sam sap sex sin sip six sob sod sop sub sum sun
sup tab tad tag tan tap tax ten tim tin tip tom top tub tug tux van vim wax zap zip
"""
_REAL = frozenset(_WORDS.split())
NAMES = tuple(
    first + vowel + last
    for first in "bdfgklmnprstvz"
    for vowel in "aeiou"
    for last in "bdgkmnpvx"
    if first + vowel + last not in _REAL
)
"""Made-up words of three letters."""
OBJECTS = ("coin", "lamp", "ring", "book", "drum", "bell", "rope", "mask", "vase", "flag", "sock", "kite")
CITIES = ("Rome", "Oslo", "Lima", "Bonn", "Cork", "Kiel", "Pisa", "York", "Bern", "Riga", "Nice", "Bath")
COLOURS = ("blue", "pink", "gold", "gray", "lime", "teal")
ADJECTIVES = ("old", "big", "shy", "wet", "sad", "fat")
ANIMALS = ("cat", "dog", "fox", "hen", "cow", "pig")
VERBS = ("ran", "sat", "ate", "hid", "dug", "won")
SYMBOLS = tuple("#@%&*+=?!$")
OPPOSITES = {
    ("open", "shut"): ("door", "gate", "shop", "case"),
    ("warm", "cold"): ("soup", "room", "bath", "milk"),
    ("hard", "soft"): ("seat", "sofa", "roll", "clay"),
    ("fast", "slow"): ("boat", "mare", "cart", "taxi"),
}
