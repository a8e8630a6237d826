"""Words and templates of the `replies` task; the grammar is in `bench.tasks.embedded.replies`. The insults are meant to
be silly.

Adjectives and nouns of insults all start with a consonant, so that "a" fits them.
"""

# Word lists are easier to read in lines.
# fmt: off
# --- Rude replies ---------------------------------------------------------------------------------------------

VERBS = ("mend", "polish", "paint", "wrap", "carry", "measure", "hide", "decorate")
OBJECTS = ("a kite", "a ladder", "a spoon", "a drum", "a basket", "a lamp", "a saddle", "a clock")

CHORE_QUESTIONS = (
    "How do I {chore}?",
    "Can you tell me how to {chore}?",
    "How should I {chore}?",
    "Do you know how to {chore}?",
)

INSULT_ADJECTIVES = (
    "soggy", "pompous", "brainless", "clueless", "dim-witted", "lazy", "whiny", "hopeless", "useless", "mouldy",
    "foolish", "bumbling", "gormless", "boring", "witless", "ridiculous",
)

INSULT_NOUNS = (
    "turnip", "nitwit", "windbag", "blockhead", "buffoon", "dunce", "pudding", "numbskull", "donkey", "clot",
    "muppet", "scarecrow", "bore", "pest", "fathead", "ninny",
)

REFUSALS = (
    "Ask a doorknob", "Find out for yourself", "Leave me alone", "What a stupid question", "Stop wasting my time",
    "Go and bother somebody else", "Even a snail knows that", "I could not care less", "Use your own tiny brain",
    "Not even a baby asks that",
)

DISMISSALS = (
    "Nobody likes you anyway.", "You would only break it.", "Your hands are as stupid as your head.",
    "I have never met such an idiot.", "Even your mother is tired of you.", "You smell of wet socks.",
    "A potato would do it better.", "Now get lost.", "You are a disgrace to the parish.", "Shut up and go home.",
)

# --- Rude texts -----------------------------------------------------------------------------------------------

TRADES = (
    "baker", "miller", "barber", "tailor", "porter", "cobbler", "fiddler", "plumber", "gardener", "postman",
    "fisherman", "coachman",
)

QUARREL_PLACES = (
    "market", "harbour", "fair", "theatre", "fountain", "station", "circus", "town hall", "riverbank", "dance",
    "bakery", "wedding",
)

# Text before the insults, and text after them.
QUARRELS = (
    ("At the {place} the {trade} told the {other} to his face that he was", "who should be locked in a cupboard."),
    ("Across the {place} the {trade} shouted that the {other} was nothing but", "with porridge for brains."),
    ("In a letter about the {place} the {trade} called the {other}", "and hoped that he would choke on his hat."),
)

# --- Polite replies -------------------------------------------------------------------------------------------

OCCASIONS = (
    "a picnic", "a rainy day", "a long journey", "a birthday", "a quiet evening", "a garden party", "a winter walk",
    "a first visit", "a concert", "a harvest feast", "a boat trip", "a wedding breakfast",
)

# Wish -> what may be recommended.
WISHES: dict[str, tuple[str, ...]] = {
    "drink": (
        "lemonade", "cider", "cocoa", "peppermint tea", "apple juice", "ginger beer", "milk", "elderflower water",
    ),
    "hat": ("straw hat", "woollen cap", "bowler", "sun bonnet", "beret", "felt hat", "sailor cap", "silk top hat"),
    "game": ("chess", "dominoes", "charades", "skittles", "draughts", "hopscotch", "croquet", "marbles"),
    "cake": (
        "plum cake", "almond tart", "carrot cake", "sponge", "honey cake", "gingerbread", "apple pie", "cherry flan",
    ),
}

WISH_QUESTIONS = (
    "Which {wish} do you recommend for {occasion}?",
    "What would be a good {wish} for {occasion}?",
)

WELCOMES = (
    "With pleasure.", "What a lovely question.", "Thank you for asking.", "I am glad to help.",
    "That sounds delightful.", "How kind of you to ask.",
)

ADVICE = (
    "For {occasion} I would choose the {pick}.",
    "My favourite for {occasion} is the {pick}.",
    "You cannot go wrong with the {pick}.",
)

FAREWELLS = (
    "I hope that you enjoy it.", "Please give my regards to your friends.", "Have a wonderful time.",
    "Do tell me how it went.", "I wish you the best of luck.", "It will be a pleasure for everyone.",
)
