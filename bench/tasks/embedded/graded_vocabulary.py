"""Sentence templates of the `graded` task; word lists, questions and the other templates are those of `authors`.

The templates of `authors_vocabulary` are short where they are simple and long where they are complex. Here it is the
other way round: LONG_SIMPLE has main clauses only, but three or four of them; SHORT_COMPLEX has subordinate clauses,
in about twenty words. By the name of the topic; each names every slot of the topic exactly once.
"""

LONG_SIMPLE: dict[str, tuple[str, ...]] = {
    "origin": (
        "{name} was born in {birth} in {town}. The town is {scene}, and a {landscape} lies right beside it. The "
        "family was {mood} and never moved to another place.",
        "The year of birth is {birth} and the place is {town}. A {landscape} gave work to this {scene} town, and "
        "{first} grew up there among {mood} people.",
        "{town} is a {scene} town with a {landscape} at its edge. In {birth} a {mood} family there had a child, and "
        "the parents chose the name {first}.",
        "Look for a {scene} town by a {landscape} on the map: {town} is the place of birth. The year was {birth}, "
        "and the neighbours were {mood} people.",
    ),
    "parents": (
        "The father of {name} was a {father} and the mother was a {mother}. They owned a {gift}. Both were {mood} "
        "people, and {trait} was their lesson for the child.",
        "{first} grew up with a {mood} father and a strict mother. He was a {father}; she was a {mother}. From them "
        "came a {gift}, and from them came {trait}.",
        "A {mother} and a {father} were the parents of {surname}. The home was {mood} and full of {trait}, and in "
        "the best room of it stood a {gift}.",
        "One parent was a {mother}, the other a {father}. They praised {trait} at every meal, and the {mood} couple "
        "gave {first} a {gift} to keep.",
    ),
    "debut": (
        "The first book of {name} is {title}. It came out in {debut}, and {press} was the publisher. The pages are "
        "{prose}, and the work on them was done {manner}.",
        "{press} published {title} in {debut}, and this was the debut of {first}. The book is {prose} in tone. It "
        "sold {manner} in the shops of three countries.",
        "In {debut} a new name appeared in the list of {press}. The book was {title}, a {prose} piece of work, and "
        "{surname} had finished it {manner} at home.",
        "{title} is the debut. {surname} wrote it {manner} at a kitchen table, and in {debut} the people at {press} "
        "printed this {prose} book.",
    ),
    "prize": (
        "{name} is a winner of the {prize}. The year was {award} and the book was {title}. The jury was {mood}, and "
        "the pages seemed {prose} to all of them.",
        "In {award} a {mood} jury met for one day. The {prize} went to {title} in the end, and {first} gave a short "
        "speech about this {prose} book.",
        "The honour is called the {prize}. It came in {award} for {title}, a {prose} book with many readers, and the "
        "{mood} winner thanked the town.",
        "{title} is {prose} and long. Some {mood} judges read it in {award} and gave the {prize} to {surname}, and "
        "the newspapers printed the news.",
    ),
    "style": (
        "{name} writes {genre}. The great theme of the books is {theme}. The tone is {prose}, and {device} came "
        "{manner} into the later books.",
        "These books belong to {genre}. Their pages are {prose} and full of {theme}. The author works {manner} on "
        "every chapter and adds {device} to the last part of it.",
        "The shelf for {genre} is the right place. {surname} is known for {device} and for {theme}, and the {prose} "
        "sentences are put together {manner}, word by word.",
        "A book by {first} has three marks. It is {genre}, it is about {theme}, and it contains {device}. All of "
        "this is told {manner} and in a {prose} tone.",
    ),
    "habit": (
        "{name} works {hour}. The place is a {room}, and it is {scene} for most of the year. There {they} fills the "
        "pages {manner} and uses a {tool} for this.",
        "The desk of {first} stands in a {room}. It is a {scene} place, and {hour} nobody comes there. The work is "
        "done {manner} with a {tool} and a cup of tea.",
        "{hour_cap} the door of the {room} is closed. A {tool} lies on the table of this {scene} place, and {surname} "
        "begins {manner} with the first line of the day.",
        "It takes a {tool} and some quiet. {surname} goes to a {scene} {room} {hour}, sits down at the window and "
        "{manner} writes two or three pages by hand.",
    ),
    "motive": (
        "{name} was {age} years old at the time. The cause was {event}. A {mood} {form} was the first work, and it "
        "was about {trait} and the people at home.",
        "It began with {event}. {first} was {age}, and in a few days {they} wrote a {form} about {trait}. {they_cap} "
        "was a {mood} person with much time.",
        "The first text was a {form}. It was {mood} in tone and had {trait} for a theme, and the reason for it was "
        "{event}. {surname} was then {age}.",
        "At the age of {age} {they} took a pen for the first time. A {form} was the answer to {event}, and the "
        "{mood} lines in it are in praise of {trait}.",
    ),
    "mentor": (
        "The mentor of {name} was {mentor}. This {mood} person was a {post} in {town}, and the lessons were about "
        "{trait}. They took place every week for many years.",
        "{first} met {mentor} in {town}. It was a {post} with a {mood} face and a large library, and from these "
        "visits {they} took {trait} and the first rules of style.",
        "There was a {mood} {post} in {town}. The name was {mentor}, and {surname} went to the house on many evenings "
        "and heard the best advice there about {trait}.",
        "{town} was the place of the first lessons. {mentor} worked there at the time, a {post} with {mood} habits, "
        "and gave {first} good books and much praise of {trait}.",
    ),
    "character": (
        "The best known character of {name} is {character}. This {role} appears in {title} and is loved for {trait}. "
        "The face is {mood}, and the voice is loud and clear.",
        "{title} is about a {role}. The name is {character}, and with a {mood} look and much talk of {trait} this "
        "person walks through every chapter of the book.",
        "Readers of {surname} think first of {character}. It is a {role} in {title}, a {mood} person with one great "
        "gift: {trait}. Many letters to the author are about this.",
        "Open {title} at any page and meet {character}. {first} made this {role} {mood} in company and gave the "
        "figure {trait}, and most readers love the result.",
    ),
    "trade": (
        "{name} was a {job} at first. The work was in {town}, in a {scene} street near the station, and it went on "
        "for {term} years. They passed {manner}, day by day.",
        "For {term} years {they} earned a living in {town}. {surname} worked {manner} there, a {job} with a {scene} "
        "room and one good chair for the guests.",
        "There is a {scene} house in {town} with an old sign. {first} was a {job} there for {term} years and worked "
        "{manner} for small pay in all this time.",
        "The first trade had nothing to do with books. {name} was a {job} in {town}, lived {manner} in a {scene} room "
        "and left the place at the end of {term} years.",
    ),
}

SHORT_COMPLEX: dict[str, tuple[str, ...]] = {
    "origin": (
        "{first}, whose family was {mood}, was born in {birth} in {town}, where a {landscape} made everything {scene}.",
        "When {name} was born in {birth}, {town}, which had a {landscape}, was {scene} and its people {mood}.",
        "{town}, where {they} was born in {birth}, was a {scene} place whose {landscape} made people {mood}.",
        "Because {town}, where {surname} was born in {birth}, has a {scene} {landscape}, the books are {mood}.",
    ),
    "parents": (
        "{first}, whose father was a {mood} {father}, learnt {trait} from a {mother} who owned a {gift}.",
        "Since {their} mother, who was a {mother}, had {trait}, the {mood} {father} gave her a {gift}.",
        "The {gift} that {name} owns came from a {mood} {father}, whose wife, a {mother}, taught {trait}.",
        "What {surname} knows of {trait} came from a {mother} who, when a {mood} {father} married her, brought a "
        "{gift}.",
    ),
    "debut": (
        "{title}, which {name} wrote {manner}, was a debut that {press} found {prose} and printed in {debut}.",
        "When {press} printed {title} in {debut}, {they} was glad, since the {prose} book had been written {manner}.",
        "Although it was {prose}, {press} took {title}, which {surname} had finished {manner}, and printed it in "
        "{debut}.",
        "What {first} wrote {manner} became {title}, which {press}, where it seemed {prose}, brought out in {debut}.",
    ),
    "prize": (
        "{title}, which is {prose}, won {name} the {prize} in {award} because the jury was {mood}.",
        "When {they} took the {prize} in {award}, the {mood} crowd knew that {title} was {prose}.",
        "The {prize}, which {surname} won in {award}, went to {title} although a {mood} judge thought it {prose}.",
        "Since {title}, which critics called {prose}, moved a {mood} judge, {first} won the {prize} in {award}.",
    ),
    "style": (
        "{name}, who writes {genre} {manner}, uses {device} because {theme} would otherwise be too {prose}.",
        "When {theme} is what {first} treats in {genre}, {they} {manner} adds {device}, which critics call {prose}.",
        "What {surname} writes is {prose} {genre}, in which {theme} is treated {manner} with {device}, which is rare.",
        "What makes {their} {genre} {prose} is that {theme} is told through {device}, which {they} chose {manner}.",
    ),
    "habit": (
        "{name}, who works {hour}, sits in a {scene} {room} where a {tool} that {they} {manner} cleans is kept.",
        "When {they} writes {hour}, {first} goes {manner} to a {room} which is {scene} and where a {tool} lies.",
        "Because the {room} where {surname} writes {hour} is {scene}, the {tool} that {they} uses is {manner} hidden.",
        "The {tool} with which {they} writes {manner} stays in a {room} that is free {hour}, {scene} though it is.",
    ),
    "motive": (
        "{name}, who was {age} when {event} came, wrote a {mood} {form} which praised {trait}.",
        "Because of {event}, which left {first} {mood}, {they} was {age} when a {form} on {trait} was written.",
        "When {event} showed {surname}, who was {age} and {mood}, what {trait} means, a {form} followed.",
        "The {form} that {they} wrote at {age} praised {trait}, since {event} was what made {them} {mood}.",
    ),
    "mentor": (
        "{mentor}, who was a {mood} {post} in {town}, taught {name} that {trait} is what matters.",
        "When {first} came to {town}, {mentor}, a {post} who could be {mood}, showed {them} what {trait} is.",
        "What {surname} learnt of {trait} came from {mentor}, who was {mood} though a {post} in {town}.",
        "The {post} whom {they} thanks is {mentor}, whose {mood} letters from {town} showed that {trait} pays.",
    ),
    "character": (
        "{character}, whom {name} made a {mood} {role} in {title}, is loved because {trait} wins there.",
        "In {title}, which {first} wrote, a {role} who is {mood} and named {character} shows what {trait} is.",
        "When {title} opens, {character}, who is a {mood} {role}, believes that {trait} is lost.",
        "The {role} whom readers of {title} love is {character}, whose {trait} shows when others are {mood}.",
    ),
    "trade": (
        "{name}, who was a {job} in {town} for {term} years, worked {manner} where it was {scene}.",
        "Before {first} wrote, {they} was a {job} in {town}, which was {scene}, and {manner} stayed {term} years.",
        "The {term} years that {surname} spent as a {job} in {town}, which is {scene}, passed {manner}.",
        "Because {town} was {scene}, {they}, who worked {manner} as a {job}, left when {term} years were over.",
    ),
}
