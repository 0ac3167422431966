"""The closed word lists. Every skill that copies draws from them, so that each word is one token."""

# ruff: noqa: SIM905 - lists of words read best as words

NAMES = (
    "Anna Alice Bob Ben Carl Clara David Diana Emma Eric Eva Frank Fred Grace Hanna Henry Ida Jack "
    "James Jane John Julia Kate Laura Leo Lily Lucy Luke Mark Mary Max Maya Mia Nina Noah Nora "
    "Olga Oscar Otto Paul Peter Rosa Ruth Sam Sara Simon Sofia Theo Tim Tom Vera Victor Will Zoe"
).split()
CITIES = (
    "Paris London Berlin Rome Madrid Vienna Oslo Lisbon Athens Dublin Prague Warsaw Helsinki "
    "Stockholm Copenhagen Brussels Budapest Tokyo Cairo Delhi Lima Ottawa Havana Nairobi Bangkok "
    "Boston Chicago Milan Munich Hamburg Geneva Zurich Porto Kyoto Sydney Toronto Dallas Seattle "
    "Denver Miami"
).split()
COLOURS = "red blue green yellow black white orange purple pink brown grey gold silver".split()
FOODS = "pizza bread soup rice cake pasta cheese salad fish eggs honey apples".split()
PETS = "dog cat horse rabbit parrot hamster".split()
ANIMALS = ("fox dog cat bear rabbit mouse owl horse duck frog bird wolf pig cow sheep lion").split()
WORDS = (
    "river stone lamp table chair window garden forest mountain ocean bridge road house door key "
    "book paper pencil letter music song dance bell clock watch wheel wagon boat ship train plane "
    "engine bottle glass cup plate spoon fork knife basket box bag coat hat shoe ring crown sword "
    "shield castle tower wall roof floor field farm hill valley lake island beach sand snow rain "
    "wind storm cloud sun moon star sky fire smoke water ice leaf tree flower grass seed root "
    "branch apple pear plum cherry lemon berry butter milk tea coffee sugar salt pepper salmon "
    "tiger eagle spider camel desert market street village school teacher doctor farmer sailor "
    "king queen prince child friend winter summer spring autumn morning evening night"
).split()
ADJECTIVES = (
    "big small old new warm cold quiet loud bright dark happy sad fast slow soft hard sweet brave "
    "kind clever"
).split()
COPIED = (*NAMES, *CITIES, *COLOURS, *FOODS, *PETS, *WORDS, *ADJECTIVES)
"""What the skills that copy are asked to copy."""
TOPICS = (
    "physics history politics football chess poetry algebra chemistry economics philosophy "
    "gravity evolution taxes marriage cooking painting photography astronomy biology geology "
    "volcanoes dinosaurs computers programming Python Linux databases networks robots rockets "
    "satellites guitars violins opera theatre movies novels fashion gardening fishing sailing "
    "cycling running swimming yoga medicine vaccines bacteria atoms electrons lasers magnets "
    "batteries cars trucks bicycles airplanes bridges elections laws courts money banks stocks "
    "inflation insurance vacations hotels restaurants recipes wine beer chocolate vitamins sleep "
    "dreams memory love friendship happiness justice truth beauty time space energy light sound"
).split()
NEW_TOPICS = (
    "knights pirates glaciers pyramids comets tornadoes violets penguins whales octopuses "
    "telescopes microscopes steam cotton silk velvet pottery sculpture ballet jazz karate rugby "
    "hockey skiing surfing archery juggling magic riddles proverbs grammar spelling Latin Greek"
).split()
"""Topics that never occur in training: for the evaluation of "I do not know"."""

_SYLLABLES = (
    "ba be bo da de do fa fi fo ga go ka ki ko la le li lo ma mi mo na ne no pa pi po ra re ri ro "
    "sa se so ta te ti to va vi vo za zu bel dor fen gar hal kin lum mer nor pel ran sol tar vin"
).split()


def pseudo_word(pick: float, second: float, third: float) -> str:
    """An invented word of two or three syllables, from three numbers in [0, 1)."""
    count = len(_SYLLABLES)
    word = _SYLLABLES[int(pick * count)] + _SYLLABLES[int(second * count)]
    return word + (_SYLLABLES[int(third * 2 * count)] if third < 0.5 else "")
