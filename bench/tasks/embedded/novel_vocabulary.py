"""Words and sentences of the novel of the `novel` task; the grammar is in `bench.tasks.embedded.novel`.

Every list is invented or plain dictionary vocabulary, and no list has words that another has: an object is named by an
adjective and a noun.
"""

# Word lists are easier to read in lines.
# fmt: off
PEOPLE = (
    "Tamsin Quill", "Barnaby Rusk", "Odette Fallow", "Corwin Thatch", "Mirabel Stoat", "Jasper Nettle",
    "Philippa Dray", "Ambrose Kettle", "Rosalind Marl", "Hugo Pennywhistle", "Sabine Larch", "Edmund Crake",
)

PLACES = (
    "the clock tower of Orvelmoor", "the drowned library", "the glass orchard", "the inn at Hollow Bend",
    "the lighthouse of Skarne", "the salt caves", "the moving bridge", "the winter garden", "the house of maps",
    "the mill on the Brenn", "the owl market", "the ferry landing", "the marble quarry",
    "the attic of the observatory", "the puppet theatre", "the sunken road",
)

OBJECT_ADJECTIVES = (
    "brass", "cracked", "velvet", "rusty", "painted", "hollow", "frozen", "borrowed", "crooked", "gilded", "woollen",
    "broken", "enormous", "striped", "mouldy", "carved", "folded", "glass", "patched", "singing", "polished",
    "wooden", "forgotten", "tiny",
)
OBJECT_NOUNS = (
    "compass", "mirror", "glove", "key", "whistle", "barrel", "umbrella", "notebook", "bell", "telescope", "duck",
    "oar", "teapot", "harness", "ladle", "fiddle", "button", "suitcase", "pillow", "hourglass", "kite", "anvil",
    "thimble", "hammock",
)

SLOTS: dict[str, tuple[str, ...]] = {
    "time": (
        "at dawn", "before supper", "on the third night", "when the bells fell silent", "after the rain",
        "at low tide", "in the blue hour", "towards midnight", "on the eve of the fair", "while the others slept",
        "at noon", "when the fog lifted", "as the lamps went out", "on the longest day", "before the first frost",
        "at the turn of the tide",
    ),
    "creature": (
        "a grey heron", "an old mastiff", "a one-eyed cat", "a tame jackdaw", "a lame pony", "a white hare",
        "a sleepy badger", "a swarm of bees", "a silent swan", "a brindled goat", "a nervous parrot",
        "a wandering goose",
    ),
    "manner": (
        "without a word", "with trembling hands", "as quietly as snow", "in a great hurry", "with a crooked smile",
        "against all advice", "for the second time", "with some regret", "as if in a dream", "with the utmost care",
        "laughing softly", "in the worst of tempers", "under a borrowed name", "by the light of a match",
    ),
    "sight": (
        "smoke above the hills", "a red sail on the horizon", "footprints in the flour", "a face at the window",
        "lights beneath the water", "a name carved in the door", "a ladder without rungs", "an empty cradle",
        "a table laid for nine", "snow on the roses", "a boat full of clocks", "a stranger in a tall hat",
        "a crack in the ceiling", "a procession of geese", "a letter addressed to nobody", "a shadow with no owner",
    ),
    "secret": (
        "the lantern had never been lit", "the tide obeyed nobody", "the mayor was a fraud",
        "the map was drawn upside down", "the bridge moved only on Sundays", "the dead do not write letters",
        "the sea had a door", "the owls were counting", "every clock in town was lying", "the inn had no cellar",
        "the captain could not swim", "the orchard remembered names", "the king had been a baker",
        "the fog was hiding something", "the quarry was getting deeper", "the puppets had moved",
    ),
    "feeling": (
        "relieved", "ashamed", "furious", "oddly calm", "homesick", "proud", "bewildered", "seasick", "brave",
        "half asleep", "suspicious", "hopeful", "weary", "delighted",
    ),
}

SENTENCES = (
    "{hero} hid the {object} behind the stairs of {place} and did not speak of it again until they met {time}.",
    "It was {friend} who found the {object} in the straw and carried it down to the water {manner}.",
    "{time_cap} a messenger left the {object} on the doorstep of {place} and ran away before anyone could thank him.",
    "From the roof {hero} looked through the {object} and saw {sight}, just as the old song had promised.",
    '"Put down that {object} and listen to me," said {friend}, who had known for years that {secret}.',
    "On the lid of the {object} somebody had written in red ink that {secret}.",
    "When {friend} struck the {object} three times, {creature} came out of the dark and lay down by the fire.",
    "Everybody in the village wanted to touch the {object}, but {hero} felt {feeling} and locked the door.",
    '"I am {feeling}," {hero} admitted at last, and threw the {object} into the well behind {place}.',
    "With the point of the {object} {friend} drew a picture in the dust, and what it showed was {sight}.",
    "It turned out that {creature} had stolen the {object}, and nobody had the heart to scold it.",
    "{hero} fell asleep with the {object} under one arm, dreamed of {sight}, and woke up hungry.",
    "They buried the {object} in the garden {manner} and marked the spot with seven white stones.",
    "{friend} laid one hand on the {object} and swore before the whole company to return {time}.",
    "The {object} was worth more than all of {place}, yet {friend} gave it to {creature} without a second thought.",
    '"Who has taken my {object}?" cried {hero} {manner}, and all the windows of the street were shut.',
)
