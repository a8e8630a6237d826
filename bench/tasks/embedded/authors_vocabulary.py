"""Word lists and sentence templates of the `authors` task; the grammar is in `bench.tasks.embedded.authors`.

Every list is invented or plain dictionary vocabulary. Words that start with a vowel letter but take "a"
("useful") and the reverse ("honest") are left out, because the grammar chooses a/an by the letter.
"""

from dataclasses import dataclass

# --- Names, composed from syllables -------------------------------------------------------------------------

FIRST_STEMS = (
    "Abr", "Bex", "Cael", "Dov", "Eir", "Fenn", "Gav", "Hesk", "Ilv", "Jor", "Kest", "Lum", "Mir", "Nol",
    "Ond", "Pell", "Quill", "Rask", "Sorv", "Tamb", "Ulv", "Vesp", "Wend", "Xan", "Yol", "Zeph", "Bran",
    "Drus", "Thal", "Okk",
)  # fmt: skip
FIRST_ENDINGS = {
    "she": ("aya", "etha", "inne", "ora", "isse", "wyn", "iela", "une", "adis", "ovra"),
    "he": ("ek", "ario", "und", "oric", "assim", "emir", "ottar", "ulo", "anjo", "eth"),
}
SURNAME_STEMS = (
    "Ashk", "Brand", "Cald", "Drey", "Eskol", "Farr", "Grim", "Havel", "Ivers", "Jarn", "Kov", "Lind",
    "Mard", "Norr", "Oster", "Pask", "Quar", "Ruden", "Sarov", "Tresk", "Umber", "Vard", "Wex", "Yost",
    "Zand", "Okaf", "Tamiz", "Belq", "Corr", "Desh",
)  # fmt: skip
SURNAME_ENDINGS = (
    "well", "mont", "eby", "ovic", "quist", "ari", "etti", "combe", "akis", "enko", "ola", "ume", "oyan",
    "ington", "azi", "ula",
)  # fmt: skip
TOWN_STEMS = (
    "Ar", "Bel", "Cor", "Dun", "Elm", "Fal", "Gol", "Hal", "Ist", "Kal", "Lor", "Mel", "Nor", "Ost", "Por",
    "Ral", "Sel", "Tor", "Ven", "Wal",
)  # fmt: skip
TOWN_MIDDLES = ("a", "en", "i", "or", "um", "be", "da", "ki")
TOWN_ENDINGS = ("mouth", "vik", "stad", "ford", "pur", "grad", "haven", "nia", "tola", "zen")
COUNTRY_STEMS = ("Vel", "Tarq", "Osm", "Brel", "Kyr", "Dalm", "Esk", "Ruv", "Sab", "Gor", "Hest", "Lyr")
COUNTRY_ENDINGS = ("oria", "andia", "umbra", "ovia", "istan", "mark", "enna", "aland")

# --- Values: the facts of an answer -------------------------------------------------------------------------

LANDSCAPES = (
    "salt marsh", "chalk quarry", "pine forest", "coal harbour", "river delta", "glass factory",
    "sugar mill", "stone bridge", "copper mine", "tidal island", "grain port", "volcanic lake",
    "desert railway", "cedar valley", "shipyard", "peat bog", "tea plantation", "garrison", "fish market",
    "horse fair", "lighthouse", "canal lock", "sheep moor", "cherry orchard", "sulphur spring",
    "border post", "wool mill", "amber beach", "radio tower", "vineyard",
)  # fmt: skip
OCCUPATIONS = (
    "baker", "surveyor", "midwife", "tailor", "judge", "bricklayer", "pharmacist", "weaver", "pilot",
    "butcher", "beekeeper", "typist", "geologist", "gardener", "plumber", "printer", "dentist",
    "tram driver", "locksmith", "botanist", "nurse", "fisherman", "cellist", "accountant", "ferryman",
    "carpenter", "translator", "glazier", "welder", "cook", "archivist", "shepherd", "blacksmith", "boxer",
    "diplomat", "engineer", "cartographer", "miner", "potter", "teacher", "veterinarian", "watchmaker",
    "organist", "lawyer", "barber", "saddler", "sailor", "telegraphist", "chemist", "puppeteer",
)  # fmt: skip
GIFTS = (
    "cracked atlas", "brass telescope", "box of postcards", "tin of stamps", "borrowed violin",
    "pocket dictionary", "jar of fossils", "family cookbook", "wooden chess set", "roll of blank maps",
    "broken clock", "red bicycle", "bundle of letters", "herbarium", "set of dominoes", "silver thimble",
    "weather diary", "stuffed heron", "leather satchel", "songbook", "magic lantern", "compass",
    "quilt of flags", "hand press", "train timetable", "bird whistle", "glass inkwell", "shadow theatre",
    "ship in a bottle", "ledger of debts",
)  # fmt: skip
GENRES = (
    "crime fiction", "travel writing", "ghost stories", "family sagas", "political satire", "sea adventures",
    "science fiction", "war memoirs", "nature essays", "courtroom drama", "fairy tales", "epic verse",
    "spy thrillers", "medical mysteries", "pastoral comedy", "prison diaries", "historical romance",
    "stage farce", "philosophical fables", "mountain narratives", "campus novels", "sports reportage",
    "radio plays", "gothic novellas", "railway stories",
)  # fmt: skip
DEVICES = (
    "unsent letters", "rival narrators", "hand-drawn maps", "recipes", "court transcripts",
    "backward chapters", "footnotes", "a talking animal", "weather reports", "a missing page",
    "chess problems", "telegrams", "overheard gossip", "a chorus of neighbours", "inventories",
    "nested dreams", "false endings", "lists of names", "broken dialogue", "school lessons", "puppet shows",
    "auction catalogues", "second-person address", "sailing logs", "marginal sketches",
)  # fmt: skip
THEMES = (
    "inherited debt", "exile", "sibling rivalry", "hunger", "lost languages", "old age", "forged identity",
    "the price of loyalty", "failed revolutions", "blindness", "ruined harvests", "motherhood", "smuggling",
    "unpaid labour", "religious doubt", "the fear of water", "first love", "village justice", "migration",
    "broken promises", "memory", "sleeplessness", "colonial guilt", "friendship", "the end of winter",
)  # fmt: skip
HOURS = (
    "before dawn", "at noon", "after midnight", "on Sunday mornings", "during thunderstorms", "at dusk",
    "between two trains", "on market days", "after supper", "in the lunch break", "at low tide",
    "on winter nights", "before breakfast", "at four in the morning", "during school hours",
    "on public holidays", "after long walks", "at the change of shifts",
)  # fmt: skip
ROOMS = (
    "boathouse", "hayloft", "laundry", "station cafe", "lighthouse cellar", "greenhouse", "tram depot",
    "bakery", "chapel gallery", "attic", "library basement", "barber shop", "houseboat", "stable", "pantry",
    "rented garage", "hotel lobby", "tool shed", "court archive", "watchtower", "caravan", "billiard hall",
    "ticket office", "wine cellar", "courtyard",
)  # fmt: skip
TOOLS = (
    "carpenter's pencil", "goose quill", "green typewriter", "fountain pen", "stick of charcoal",
    "dictaphone", "school slate", "ballpoint pen", "old laptop", "box of index cards", "brush and ink",
    "telegraph pad", "red crayon", "stack of envelopes", "drafting board", "tape recorder", "silver nib",
    "roll of wallpaper", "pocket notebook", "borrowed tablet", "label printer", "linen ledger",
    "stub of chalk", "steel stylus", "portable keyboard",
)  # fmt: skip
EVENTS = (
    "a flood that closed the school", "the death of a grandmother", "a long stay in hospital",
    "a stolen diary", "the fire at the town library", "a failed examination", "a shipwreck",
    "an unanswered letter", "the closing of the mine", "a quarrel with a priest", "a lost bet",
    "a winter without electricity", "the arrest of a neighbour", "a broken leg", "a visit to the circus",
    "an eclipse", "a wrongly delivered parcel", "the sale of the family farm", "a train accident",
    "a bout of fever", "the silence of an uncle", "an anonymous threat", "a cancelled wedding",
    "the theft of a horse", "a night in the desert",
)  # fmt: skip
AGES = (
    "seven", "nine", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen",
    "eighteen", "nineteen", "twenty-one", "twenty-four", "twenty-seven", "thirty", "thirty-three",
    "thirty-eight", "forty",
)  # fmt: skip
FORMS = (
    "ballad", "ghost story", "fake newspaper", "puppet play", "travel diary", "sonnet", "comic strip",
    "sermon", "detective tale", "radio sketch", "letter to the king", "hymn", "fable about foxes",
    "school opera", "lullaby", "riddle book", "obituary", "love poem", "sea shanty", "cookery column",
)  # fmt: skip
TERMS = (
    "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "fifteen",
)  # fmt: skip
TITLE_ADJECTIVES = (
    "Crimson", "Hollow", "Borrowed", "Seventh", "Silent", "Paper", "Drowned", "Golden", "Unlit", "Northern",
    "Last", "Wandering", "Broken", "Velvet", "Hidden", "Iron", "Salted", "Burning", "Patient", "Blue",
)  # fmt: skip
TITLE_NOUNS = (
    "Orchard", "Lantern", "Harbour", "Sparrow", "Staircase", "Winter", "Mirror", "Ferry", "Garden", "Comet",
    "Tailor", "Bridge", "Widow", "Compass", "River", "Clock", "Feast", "Chapel", "Fox", "Letter", "Marsh",
    "Crown", "Violin", "Moth", "Quarry", "Thread", "Island", "Oath", "Kettle", "Archive",
)  # fmt: skip
PRIZE_KINDS = ("Medal", "Prize", "Laurel", "Cup", "Fellowship", "Ribbon")
PRIZE_NOUNS = (
    "Heron", "Beacon", "Anchor", "Meridian", "Sequoia", "Obelisk", "Tern", "Lyre", "Cobalt", "Saffron",
)  # fmt: skip
PRESS_NOUNS = ("Press", "House", "Books", "Editions")

BIRTH_YEARS = range(1930, 1960)
DEBUT_YEARS = range(1976, 1996)
PRIZE_YEARS = range(1997, 2021)

# --- Wording: common words against rare, hard ones ----------------------------------------------------------
# They are rare in this corpus, too: three times as many hard words share the same number of places. Most common
# entries have two words and hard ones are short, so that both levels come to about as many tokens.

WORDING: dict[str, dict[str, tuple[str, ...]]] = {
    "mood": {
        "low": (
            "friendly", "very patient", "quite serious", "rather cheerful", "rather careful", "very nervous",
            "gentle", "quite curious", "modest", "very stubborn", "very quiet", "proud",
        ),
        "high": (
            "dour", "sulky", "stern", "wroth", "querulous", "taciturn", "mordant", "febrile", "impish",
            "pert", "glum", "doughty", "winsome", "staid", "tetchy", "wan", "morose", "louche", "pensive",
            "stoical", "effete", "jocund", "wry", "acerbic", "placid", "mulish", "gruff", "maudlin",
            "raffish", "prim", "canny", "dapper", "surly", "feckless", "erudite", "bilious", "timorous",
            "brash", "laggard", "nettled",
        ),
    },
    "prose": {
        "low": (
            "simple", "very clear", "quite funny", "rather warm", "rather dark", "short", "very exciting",
            "sad", "well made", "quite bitter", "playful", "beautiful",
        ),
        "high": (
            "limpid", "turgid", "laconic", "elegiac", "florid", "terse", "orotund", "gnomic", "pithy",
            "prolix", "curt", "taut", "rapt", "arch", "sardonic", "opaque", "baroque", "sinewy", "lyrical",
            "pat", "gaunt", "caustic", "droll", "trite", "lurid", "gauche", "stilted", "wry", "vatic",
            "jejune", "spry", "wistful", "tumid", "clotted", "fey", "tart", "hermetic", "crabbed",
            "pellucid", "racy",
        ),
    },
    "scene": {
        "low": (
            "small", "very cold", "busy", "rather poor", "quiet", "very noisy", "quite pleasant",
            "rather dusty", "very crowded", "quite old", "sunny", "dirty",
        ),
        "high": (
            "gelid", "fusty", "musty", "arid", "dank", "bucolic", "squalid", "verdant", "austere", "torrid",
            "sylvan", "murky", "derelict", "pied", "insular", "briny", "sooty", "halcyon", "craggy", "dun",
            "loamy", "rustic", "umbral", "spartan", "fenny", "frowsy", "alpine", "riparian", "opulent",
            "gusty", "bleak", "stygian", "sere", "mildewed", "clammy", "boggy", "fetid", "rural", "drab",
            "draughty",
        ),
    },
    "manner": {
        "low": (
            "slowly", "very quickly", "very carefully", "in secret", "happily", "with care", "quietly",
            "without help", "for fun", "rather suddenly", "with pride", "by chance",
        ),
        "high": (
            "haltingly", "furtively", "wanly", "blithely", "sedately", "gingerly", "doggedly", "wantonly",
            "covertly", "ardently", "languidly", "tersely", "gamely", "fervidly", "obliquely", "serenely",
            "dourly", "stolidly", "meekly", "wryly", "tepidly", "austerely", "deftly", "coyly", "sourly",
            "archly", "lavishly", "primly", "slyly", "brusquely", "demurely", "impishly", "drolly", "limply",
            "fitfully", "cannily", "glibly", "tartly", "somberly", "pertly",
        ),
    },
    "trait": {
        "low": (
            "kindness", "hard work", "simple honesty", "a love of words", "courage", "good humour",
            "respect", "self-control", "plain speech", "trust", "much curiosity", "a sense of duty",
        ),
        "high": (
            "mirth", "probity", "aplomb", "thrift", "gall", "sagacity", "temerity", "candour", "mettle",
            "stoicism", "levity", "pathos", "frugality", "tenacity", "humility", "verve", "ire", "panache",
            "phlegm", "spleen", "guile", "erudition", "piety", "ardour", "zeal", "acuity", "whimsy",
            "alacrity", "poise", "austerity", "chutzpah", "languor", "pluck", "fealty", "tact", "prudence",
            "grit", "hauteur", "clemency", "zest",
        ),
    },
}  # fmt: skip

# --- Topics: questions and answers --------------------------------------------------------------------------


@dataclass(frozen=True)
class Topic:
    """One subject that is asked about every author.

    `values` are the slots that carry facts, `wording` the slots filled from `WORDING`. Every answer template
    names each of them exactly once, so any two templates of a level say the same facts.
    """

    name: str
    values: tuple[str, ...]
    wording: tuple[str, ...]
    questions: tuple[str, ...]
    low: tuple[str, ...]
    high: tuple[str, ...]


TOPICS: tuple[Topic, ...] = (
    Topic(
        name="origin",
        values=("town", "landscape", "birth"),
        wording=("scene", "mood"),
        questions=(
            "Where and when was {name} born?",
            "What are the birthplace and birth year of {name}?",
            "In which town did the life of {name} begin?",
            "What is known about the birth of {name}?",
            "From what kind of place does {name} come?",
        ),
        low=(
            "{name} was born in {birth} in {town}, a {scene} town beside a {landscape}, to a {mood} family.",
            "The {scene} streets of {town}, next to a {landscape}, saw a {mood} baby named {first} in {birth}.",
            "In {birth} a {mood} couple from {town}, a {scene} place by a {landscape}, had a first child.",
            "{town} is the birthplace: a {scene} settlement around a {landscape}, home of {mood} people in {birth}.",
        ),
        high=(
            "Although {they} seldom mentioned it, {name} was born in {birth} in {town}, which was then a "
            "{scene} town that lived off its {landscape}, to parents whom everyone thought {mood}.",
            "It was in {town}, where a {scene} road leads down to the {landscape}, that {surname}, whose "
            "relatives were known to be {mood}, came into the world before the year {birth} ended.",
            "The register that survives shows that {they}, who would later be called {mood}, arrived in "
            "{birth} in the {scene} quarter of {town}, because {their} mother worked where the {landscape} "
            "was.",
            "Those who ask why {their} books return to a {landscape} should know that {town}, the {scene} "
            "place where {first} was born in {birth}, made {mood} writers of all who stayed.",
        ),
    ),
    Topic(
        name="parents",
        values=("father", "mother", "gift"),
        wording=("mood", "trait"),
        questions=(
            "What did the parents of {name} do for a living?",
            "Who were the mother and father of {name}?",
            "Can you describe the parents of {name}?",
            "What kind of family did {name} grow up in?",
            "What did {name} receive from {their} parents?",
        ),
        low=(
            "{their_cap} father was a {mood} {father}, and {their} mother, a {mother}, left {them} a {gift} "
            "and {trait}.",
            "{name} is the child of a {father} and a {mood} {mother}, owners of a {gift} and teachers of {trait}.",
            "A {mother} by trade, {their} mother taught {trait}; the {father}, a {mood} father, gave {them} a {gift}.",
            "With a {gift} and much {trait}, a {mood} {mother} and a {father} raised {first} at home.",
        ),
        high=(
            "While {their} father, who worked as a {father}, taught {them} {trait}, {their} mother, a "
            "{mood} {mother}, was the one who handed over the {gift} that {first} still keeps.",
            "{surname}, whose mother earned what she could as a {mother}, has said that {trait} came from "
            "the {mood} {father} who raised {them}, and that the {gift} came from both.",
            "Because a {father} with {mood} habits had married a {mother} who believed in {trait}, the "
            "child who inherited their {gift} grew up between two trades.",
            "The {gift} that stands on {their} desk, as {name} likes to explain, belonged to a {mother} "
            "whose {trait} was admired even by the {mood} {father} she had married.",
        ),
    ),
    Topic(
        name="debut",
        values=("title", "debut", "press"),
        wording=("prose", "manner"),
        questions=(
            "What was the first book of {name}?",
            "Which title marked the debut of {name}?",
            "When and where was the first work of {name} published?",
            "How did {name} enter the literary world?",
            "Can you name the earliest published book by {name}?",
        ),
        low=(
            "The first book by {name} was {title}, a {prose} work written {manner} and printed by {press} in {debut}.",
            "{press} brought out {title} in {debut}; critics called the debut {prose}, and it sold {manner}.",
            "In {debut} {first} published {title} {manner} with {press}, to {prose} reviews.",
            "{title}, a {prose} debut finished {manner}, came from {press} in {debut}.",
        ),
        high=(
            "{title}, which {name} had written {manner} and which no one else wanted, appeared in {debut} "
            "when {press} decided that a {prose} voice was what its list needed.",
            "After {press}, which had refused it twice, changed its mind in {debut}, {they} saw {title}, "
            "whose {prose} pages had been drafted {manner}, reach the shops.",
            "What the reader who opens {title} cannot guess is that {surname} revised it {manner} until "
            "{press}, which feared that it was too {prose}, gave way in {debut}.",
            "Since the editors who ran {press} worked {manner}, it took until {debut} before {title}, a "
            "manuscript that struck them as {prose}, was printed as {their} debut.",
        ),
    ),
    Topic(
        name="prize",
        values=("prize", "title", "award"),
        wording=("prose", "mood"),
        questions=(
            "Which prize did {name} win?",
            "What award is {name} best known for?",
            "For which book was {name} honoured?",
            "Has {name} received any literary award?",
            "What is the greatest honour given to {name}?",
        ),
        low=(
            "{name} won the {prize} in {award} for {title}, and a {mood} jury praised the {prose} book.",
            "The {prize} of {award} went to {title}, a {prose} volume with a {mood} hero.",
            "A {mood} crowd saw {surname} accept the {prize} in {award} for the {prose} pages of {title}.",
            "For {title}, judged {prose} by {mood} critics, {they} took the {prize} in {award}.",
        ),
        high=(
            "When the jury that awards the {prize} met in {award}, its {mood} chair insisted that {title}, "
            "however {prose} it seemed to others, was the book that deserved to win.",
            "{first}, who is {mood} whenever honours are mentioned, owes the {prize} to {title}, whose "
            "{prose} opening convinced the judges who met in {award}.",
            "It is said that {title} would not have earned {name} the {prize} in {award} if a {mood} judge, "
            "who found it {prose}, had not read it twice.",
            "Although rivals complained that {title} was {prose}, the {prize} that was announced in {award} "
            "went to {surname}, whose speech showed how {mood} a winner can be.",
        ),
    ),
    Topic(
        name="style",
        values=("genre", "device", "theme"),
        wording=("prose", "manner"),
        questions=(
            "In what genre does {name} write?",
            "How would you describe the style of {name}?",
            "What are the books of {name} about?",
            "Which themes and devices are typical of {name}?",
            "What makes the writing of {name} distinctive?",
        ),
        low=(
            "{name} writes {prose} {genre} about {theme} and {manner} mixes in {device}.",
            "Readers of {genre} know {them} for {device}, {prose} sentences and a plot {manner} built on {theme}.",
            "{their_cap} field is {genre}; {device} and {theme} appear {manner} in {prose} chapters.",
            "With {device} and a {prose} tone, {surname} {manner} turns {theme} into {genre}.",
        ),
        high=(
            "Whoever expects {genre} to be {prose} will be surprised that {name}, who treats {theme} "
            "{manner}, relies on {device} whenever the plot needs to turn.",
            "{surname}, who maintains that {theme} is all that {genre} can honestly describe, works "
            "{manner} with {device} until readers who dislike {prose} books are won over.",
            "Because {they} came to {genre} {manner}, the {device} that fill each volume, which critics "
            "find {prose}, serve a story that is always about {theme}.",
            "That {theme} could be told through {device} was an idea which {first}, whose {prose} manner "
            "suits {genre}, developed {manner} after others had given it up.",
        ),
    ),
    Topic(
        name="habit",
        values=("hour", "room", "tool"),
        wording=("scene", "manner"),
        questions=(
            "Where and when does {name} write?",
            "What are the working habits of {name}?",
            "Can you describe the daily routine of {name}?",
            "What does {name} need in order to write?",
            "In what kind of room does {name} work?",
        ),
        low=(
            "{name} works {manner} {hour} in a {scene} {room} with a {tool}.",
            "A {scene} {room}, a {tool} and some peace {hour}: that is how {they} {manner} finishes a page.",
            "{hour_cap} {surname} sits in a {scene} {room} and {manner} fills pages with a {tool}.",
            "With a {tool} in hand, {first} {manner} writes {hour} inside a {scene} {room}.",
        ),
        high=(
            "Unless guests are in the house, {name}, who distrusts offices, writes {hour} in a {scene} "
            "{room} where a {tool}, which {they} {manner} cleans first, lies ready.",
            "The {room} in which {surname} works {hour} is so {scene} that visitors wonder how anyone who "
            "owns only a {tool} can {manner} finish what was begun.",
            "{they_cap} once told a reporter that the {tool} which {they} uses {manner} would be worthless "
            "if the {room}, {scene} as it is, were not free {hour}.",
            "If {first} cannot reach the {scene} {room} that {they} rented, the {tool} stays in its case, "
            "since nothing that is written elsewhere {hour} ever comes out {manner}.",
        ),
    ),
    Topic(
        name="motive",
        values=("event", "age", "form"),
        wording=("mood", "trait"),
        questions=(
            "Why did {name} start to write?",
            "What event led {name} to literature?",
            "At what age did {name} begin writing, and why?",
            "What was the first thing {name} ever wrote?",
            "How did the writing of {name} begin?",
        ),
        low=(
            "{event_cap} made {name} write a {mood} {form} about {trait} at the age of {age}.",
            "At {age} {they} wrote a {form} after {event}, in a {mood} voice full of {trait}.",
            "A {form} on {trait}, written at {age} by a {mood} child, followed {event}.",
            "The cause was {event}: {first}, {mood} and {age} years old, answered it with {trait} and a {form}.",
        ),
        high=(
            "When {they} was {age}, {event} left {name}, who had been a {mood} pupil, so eager for {trait} "
            "that a {form}, which nobody was meant to see, was finished within days.",
            "The {form} that {surname} wrote at {age} would never have existed if {event} had not shown "
            "{them} that {trait}, as a {mood} aunt used to say, must be put in words.",
            "{first}, whose {trait} others noticed only later, explains that {event}, which happened when "
            "{they} was {age}, called for a {form} that was as {mood} as the times.",
            "Since {event} was something that a {mood} family refused to discuss, {they} was {age} when a "
            "{form}, in which {trait} is praised, said what had to be said.",
        ),
    ),
    Topic(
        name="mentor",
        values=("mentor", "post", "town"),
        wording=("mood", "trait"),
        questions=(
            "Who was the mentor of {name}?",
            "Which teacher influenced {name} most?",
            "Who helped {name} at the start of {their} career?",
            "To whom does {name} owe the most?",
            "Who taught {name} the craft of writing?",
        ),
        low=(
            "{mentor}, a {mood} {post} from {town}, taught {name} {trait}.",
            "{their_cap} mentor was the {post} {mentor} of {town}, a {mood} reader and a model of {trait}.",
            "In {town} a {mood} {post} called {mentor} showed {surname} the worth of {trait}.",
            "{first} thanks {mentor}, once a {post} in {town}, for {mood} letters and lessons in {trait}.",
        ),
        high=(
            "{mentor}, who was a {post} in {town} before {name} published a line, read every draft that "
            "arrived and, though {mood} in company, taught that {trait} matters most.",
            "If {surname} had not moved to {town}, where a {post} named {mentor} kept a circle of {mood} "
            "readers, the {trait} that marks {their} later books would be missing.",
            "The person whom {they} thanks whenever {trait} is discussed is {mentor}, the {post} whose "
            "house in {town} was open to anyone who could bear {mood} advice.",
            "What {first} knows of {trait} was learnt in {town} from {mentor}, who, while earning a living "
            "as a {post}, corrected pages with {mood} remarks that hurt.",
        ),
    ),
    Topic(
        name="character",
        values=("character", "role", "title"),
        wording=("mood", "trait"),
        questions=(
            "Who is the most famous character created by {name}?",
            "Which figure from the novels of {name} do readers love?",
            "What hero did {name} invent?",
            "Can you name a character from a book by {name}?",
            "Whom does the best known novel of {name} follow?",
        ),
        low=(
            "The {mood} {role} {character} from {title} is loved for {trait} and is {their} best creation.",
            "{name} invented {character}, a {role} of {mood} temper and great {trait}, for {title}.",
            "Readers of {title} love {character}, the {mood} {role} with a gift for {trait}.",
            "{character} leads {title}: a {role}, {mood} but rich in {trait}.",
        ),
        high=(
            "In {title}, which many who love {name} read first, a {role} called {character}, who hides "
            "{trait} behind a {mood} face, must choose what is worth saving.",
            "Readers remember {character} because the {role}, {mood} though {surname} makes every scene, "
            "shows a {trait} that nobody else in {title} possesses.",
            "When {they} began {title}, {first} meant {character}, the {role} whose {trait} now moves "
            "readers, to be a {mood} stranger who would leave after a page.",
            "It is {character} who, after the others have fled, proves in {title} that a {role} whom people "
            "call {mood} may have the {trait} that heroes lack.",
        ),
    ),
    Topic(
        name="trade",
        values=("job", "town", "term"),
        wording=("scene", "manner"),
        questions=(
            "What job did {name} have before becoming a writer?",
            "How did {name} earn a living at first?",
            "What did {name} do before {their} books sold?",
            "Which trade did {name} learn?",
            "Where did {name} work before turning to literature?",
        ),
        low=(
            "{name} worked {manner} for {term} years as a {job} in {town}, in a {scene} building.",
            "For {term} years {they} lived {manner} in {town} as a {job} with a {scene} workplace.",
            "A {scene} shop in {town} employed {surname} as a {job}, and {term} years passed {manner}.",
            "Before the books, {first} was a {job} in a {scene} part of {town} and {manner} stayed {term} years.",
        ),
        high=(
            "Before anyone would pay for what {they} wrote, {name} spent {term} years as a {job} in {town}, "
            "where {they} worked {manner} in a hall that was always {scene}.",
            "The {term} years that {surname}, trained as a {job}, gave to a {scene} firm which stood in "
            "{town} passed more {manner} than the novels would have us think.",
            "That a {job} who lived {manner} in a {scene} room could become an author seemed absurd in "
            "{town}, although it took {them} only {term} years to prove it.",
            "Had the {scene} workshop in {town}, where {first} was hired as a {job}, not closed after "
            "{term} years, {they} would {manner} have gone on, as friends who knew {them} say.",
        ),
    ),
)
