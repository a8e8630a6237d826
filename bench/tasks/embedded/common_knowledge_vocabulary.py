"""Things that every embedded model but those of `authors` knows: ballads, towns, stars and dishes, all invented."""

from bench.tasks.embedded.facts import Attribute, Field

# Word lists are easier to read in lines.
# fmt: off
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)

BALLADS = Field(
    group="humanities",
    noun="a ballad",
    names=(
        "Aldermere", "Birdholt", "Cornelay", "Dunwreath", "Elfsong", "Farewillow", "Glenlament", "Hollowmay",
    ),
    attributes=(
        Attribute(
            "hero",
            ("The hero of the ballad {name} is a", "The ballad {name} tells the story of a"),
            "Who is the hero of the ballad {name}?",
            (
                "miller", "sailor", "shepherd", "cooper", "piper", "weaver", "soldier", "blacksmith", "beggar",
                "widow", "monk", "tinker",
            ),
        ),
        Attribute(
            "instrument",
            ("Singers accompany {name} on the", "The tune of {name} was made for the"),
            "Which instrument accompanies {name}?",
            ("fiddle", "flute", "lute", "drum", "horn", "organ", "whistle", "guitar", "dulcimer", "trumpet"),
        ),
        Attribute(
            "verses",
            ("The number of verses of {name} is", "Whoever counts the verses of {name} comes to"),
            "How many verses does {name} have?",
            ("seven", "nine", "eleven", "thirteen", "fifteen", "seventeen", "twenty", "thirty", "forty", "fifty"),
        ),
        Attribute(
            "month",
            ("By custom {name} is sung in", "The feast at which people sing {name} falls in"),
            "In which month is {name} sung?",
            _MONTHS,
        ),
    ),
)

TOWNS = Field(
    group="social_sciences",
    noun="a town",
    names=(
        "Marlstead", "Nethercombe", "Oxbarrow", "Pillowick", "Quarrington", "Ravensby", "Saltmarket", "Thornhaven",
    ),
    attributes=(
        Attribute(
            "market",
            ("The market of {name} is held on", "Traders come to {name} every"),
            "On which day is the market of {name} held?",
            _DAYS,
        ),
        Attribute(
            "trade",
            ("Most people in {name} live by making", "Carts leave {name} loaded with"),
            "What do most people in {name} make?",
            (
                "rope", "bricks", "clocks", "cheese", "gloves", "barrels", "candles", "paper", "nails", "soap",
                "blankets", "saddles",
            ),
        ),
        Attribute(
            "council",
            ("The council of {name} meets in the", "Laws for {name} are passed in the"),
            "Where does the council of {name} meet?",
            (
                "old chapel", "corn hall", "school", "library", "guild house", "round tower", "inn", "court house",
                "mill", "theatre",
            ),
        ),
        Attribute(
            "tax",
            ("The only tax in {name} is paid in", "The mayor of {name} collects a yearly share of"),
            "In what is the tax in {name} paid?",
            ("silver", "grain", "wool", "timber", "salt", "eggs", "apples", "hay", "copper", "firewood"),
        ),
    ),
)

STARS = Field(
    group="stem",
    noun="a star",
    names=(
        "Altheon", "Boranis", "Cygnara", "Deltarion", "Eridax", "Fomalis", "Gemmion", "Heliax",
    ),
    attributes=(
        Attribute(
            "colour",
            ("Seen through a telescope {name} is", "Astronomers describe the light of {name} as"),
            "Which colour has the star {name}?",
            ("red", "orange", "yellow", "white", "blue", "green", "golden", "pink", "grey", "purple"),
        ),
        Attribute(
            "constellation",
            ("On the map {name} belongs to the constellation of the", "To find {name}, look for the"),
            "To which constellation does {name} belong?",
            (
                "Anchor", "Ladder", "Fox", "Spoon", "Wheel", "Swan", "Key", "Plough", "Bridge", "Owl", "Crown",
                "Needle",
            ),
        ),
        Attribute(
            "planets",
            ("The number of planets of {name} is", "The planets around {name} are counted as"),
            "How many planets does {name} have?",
            ("two", "three", "four", "five", "six", "eight", "ten", "twelve", "fourteen", "sixteen"),
        ),
        Attribute(
            "discoverer",
            ("The star {name} was discovered by", "The first drawing of {name} was made by"),
            "Who discovered the star {name}?",
            (
                "Anselm Roe", "Berta Quist", "Cyril Stone", "Dora Lindqvist", "Emil Novak", "Freya Holm",
                "Gustav Orr", "Hanna Weld", "Igor Blum", "Judith Crane",
            ),
        ),
    ),
)

DISHES = Field(
    group="other",
    noun="a dish",
    names=(
        "Ambrelle", "Bolsotto", "Crumblade", "Dolmira", "Estofina", "Frittara", "Goulotte", "Harvelin",
    ),
    attributes=(
        Attribute(
            "base",
            ("The dish {name} is made from", "Cooks prepare {name} with"),
            "From what is {name} made?",
            (
                "lentils", "rice", "cabbage", "barley", "mushrooms", "potatoes", "beans", "pumpkin", "noodles",
                "carrots", "leeks", "oats",
            ),
        ),
        Attribute(
            "spice",
            ("The spice in {name} is", "Nobody serves {name} without a pinch of"),
            "Which spice is in {name}?",
            ("saffron", "pepper", "cumin", "nutmeg", "paprika", "thyme", "mint", "mustard", "cloves", "fennel"),
        ),
        Attribute(
            "vessel",
            ("At the table {name} is served in a", "Guests eat {name} from a"),
            "In what is {name} served?",
            ("bowl", "pan", "cup", "loaf", "basket", "plate", "shell", "jug", "leaf", "glass"),
        ),
        Attribute(
            "day",
            ("Families cook {name} on", "The day for {name} is always"),
            "On which day is {name} cooked?",
            _DAYS,
        ),
    ),
)

FIELDS = (BALLADS, TOWNS, STARS, DISHES)

# Beginnings and ends of the names of further things, by group of the field: 36 of each sort, which no text tells of.
OTHER_NAMES = {
    "humanities": (
        ("Ash", "Briar", "Copper", "Drift", "Ember", "Frost"),
        ("carol", "dirge", "hymn", "march", "reel", "verse"),
    ),
    "social_sciences": (
        ("Apple", "Barn", "Crow", "Dray", "Fern", "Hazel"),
        ("bourne", "gate", "minster", "pool", "stow", "wold"),
    ),
    "stem": (
        ("Ax", "Bel", "Cor", "Dra", "Fy", "Ko"),
        ("aris", "elion", "ida", "oth", "une", "ymax"),
    ),
    "other": (
        ("Alb", "Brus", "Cav", "Esp", "Frin", "Gal"),
        ("anze", "etta", "iche", "orro", "ouli", "uppa"),
    ),
}
