"""Words that decide whether two questions ask the same: negations, opposites, number words, units, dates. English first.

Negations of a few other languages in Latin script are listed too, because their texts reach the cache as well. Plain tables.
"""

from __future__ import annotations

from typing import Final


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


NEGATIONS: Final = _words(
    "not no never none nobody nothing nowhere neither nor cannot without except excluding hardly barely scarcely lack "
    "lacking nicht kein keine keinen nie niemals ohne pas jamais sans nunca jamás sin nessuno senza não sem niet geen nooit "
    "zonder"
)

# Each line is one pair of sides; a word of one side stands against any word of the other.
_OPPOSITES: Final = """
on / off
enable activate allow permit unblock unlock / disable deactivate forbid prohibit ban block lock prevent
start begin open launch / stop end close quit exit finish
increase raise grow gain maximize more higher up upgrade / decrease reduce lower lose minimize less fewer down downgrade
add insert install create mount attach connect include / remove delete uninstall destroy unmount detach disconnect exclude
best better good positive / worst worse bad negative
advantages advantage benefits benefit pros / disadvantages disadvantage drawbacks drawback cons
before earlier / after later
first / last
buy / sell
import / export
encrypt encode compress zip / decrypt decode decompress unzip
upload / download
win / lose
love like / hate dislike
male man men boy boys husband father / female woman women girl girls wife mother
left / right
north / south
east / west
hot warm heat / cold cool
push / pull
read / write
send / receive
give / take
minimum min smallest shortest lowest least youngest / maximum max largest biggest longest highest most oldest
small short low slow weak thin young easy cheap / large big tall long high fast strong thick old hard difficult expensive
always / never
everyone everybody everything all / nobody nothing none
possible / impossible
legal / illegal
safe / unsafe dangerous
true / false
same / different
public / private
input / output
internal inside / external outside
import / export
join enter / leave
accept approve / reject refuse deny
encourage / discourage
follow / unfollow
subscribe / unsubscribe
login / logout
mute / unmute
hide / show
with / without
early / late
rich / poor
dead death die / alive life live
ascending / descending
vertical / horizontal
horizontally / vertically
asleep sleep / awake wake
above over / below under
arrive / depart
employ hire / fire dismiss
borrow / lend
pass / fail
success / failure
even / odd
grow / shrink
war / peace
morning / evening
day / night
summer / winter
"""

OPPOSITES: Final[dict[str, frozenset[str]]] = {}


def _fill() -> None:
    found: dict[str, set[str]] = {}
    for line in _OPPOSITES.strip().splitlines():
        one, other = (side.split() for side in line.split(" / "))
        for word in one:
            found.setdefault(word, set()).update(other)
        for word in other:
            found.setdefault(word, set()).update(one)
    OPPOSITES.update({word: frozenset(against) for word, against in found.items()})


_fill()

NUMBER_WORDS: Final = {
    word: str(value)
    for value, word in enumerate(
        ("zero", "", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
         "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty")
    )  # not "one": "which one"
} | {
    "thirty": "30", "forty": "40", "fifty": "50", "sixty": "60", "seventy": "70", "eighty": "80", "ninety": "90",
    "hundred": "100", "thousand": "1000", "million": "1000000", "billion": "1000000000", "half": "0.5", "twice": "2",
    "double": "2", "triple": "3", "dozen": "12", "second": "2nd", "third": "3rd", "fourth": "4th", "fifth": "5th",
    "first": "1st", "ii": "2", "iii": "3", "iv": "4",
}  # fmt: skip

DATE_WORDS: Final = _words(
    "january february march april june july august september october november december jan feb mar apr jun jul aug sep sept "
    "oct nov dec monday tuesday wednesday thursday friday saturday sunday mon tue wed thu fri sat sun christmas easter "
    "ramadan diwali weekday weekend quarter century decade"
)

UNITS: Final = {
    form: unit
    for unit, forms in {
        "km": "km kms kilometer kilometers kilometre kilometres",
        "m": "meter meters metre metres",
        "cm": "cm centimeter centimeters centimetre centimetres",
        "mm": "mm millimeter millimeters",
        "mile": "mile miles mi",
        "foot": "foot feet ft",
        "inch": "inch inches",
        "yard": "yard yards",
        "kg": "kg kgs kilo kilos kilogram kilograms",
        "g": "gram grams",
        "mg": "mg milligram milligrams",
        "pound": "pound pounds lb lbs",
        "ounce": "ounce ounces oz",
        "l": "liter liters litre litres",
        "ml": "ml milliliter milliliters",
        "gallon": "gallon gallons",
        "s": "sec secs seconds",
        "ms": "ms millisecond milliseconds",
        "min": "minute minutes mins",
        "h": "hour hours hr hrs",
        "day": "days",
        "week": "week weeks",
        "month": "month months",
        "year": "year years yr yrs",
        "c": "celsius centigrade",
        "f": "fahrenheit",
        "kelvin": "kelvin",
        "usd": "dollar dollars usd $",
        "eur": "euro euros eur €",
        "gbp": "gbp £",
        "inr": "rupee rupees inr rs ₹",
        "jpy": "yen jpy ¥",
        "percent": "percent % pct",
        "kb": "kb kilobyte kilobytes",
        "mb": "mb megabyte megabytes",
        "gb": "gb gigabyte gigabytes gigs",
        "tb": "tb terabyte terabytes",
        "mph": "mph",
        "kmh": "kmh kph",
        "w": "watt watts",
        "v": "volt volts",
        "cal": "calorie calories kcal",
        "hz": "hz hertz",
        "mhz": "mhz",
        "ghz": "ghz",
        "acre": "acre acres",
        "hectare": "hectare hectares",
    }.items()
    for form in forms.split()
}

# Function words: they carry no topic, so that a question may gain or lose them.
FUNCTION_WORDS: Final = _words(
    "a an the is are was were be been being am do does did doing done have has had having can could will would shall should "
    "may might must to of in at by for from with as into about and or but if then than that this these those there here it "
    "its it's i i'm i'd i've my me mine we our us you your yours he she his her they them their what which who whom whose "
    "when where why how so just please really actually very also some any much many get got one ones s t re ve ll d m kind "
    "sort way ways"
)

QUESTION_WORDS: Final = {
    "what": "what", "what's": "what", "whats": "what", "which": "what", "who": "who", "who's": "who", "whom": "who",
    "whose": "whose", "when": "when", "where": "where", "where's": "where", "why": "why", "how": "how", "how's": "how",
}  # fmt: skip
QUANTITY_WORDS: Final = _words("many much long far old often tall big fast high deep")

# Subjects and objects change places around these: "from A to B" is not "from B to A".
DIRECTION_WORDS: Final = _words("to from into than before after against over under")

# Words that can stand for each other in a question that is otherwise the same, word for word. A line is one group.
INTERCHANGEABLE: Final = tuple(
    frozenset(line.split())
    for line in """
on in at by via through using with about of for within over
to for on in into
from via through using on by with
someone somebody anyone anybody person people one i you we everyone everybody they
my your our the a his her their
best top greatest good great finest better ideal
earn make get
get find obtain acquire
buy purchase get
become be get
site website page
know tell
mobile phone cellphone smartphone cell
email mail
movie film
fix repair solve resolve
begin start
method way approach technique procedure process
learn study
prepare study
easy simple
easiest simplest
big large huge
biggest largest
bigger larger
reduce lose decrease
pros advantages benefits
cons disadvantages drawbacks
signs symptoms
see watch
seen watched
stop quit
app application
university college
salary pay wage
picture photo image photograph
kid child
kids children
car automobile vehicle
doctor physician
math maths mathematics
favorite favourite
color colour
behavior behaviour
center centre
program programme
loose lose
percent percentage
use utilize
using utilizing
help assistance support
need require
fast quick
faster quicker
fastest quickest
quickly fast rapidly
happen occur
reason cause
explain describe
meaning definition
vs versus
tips ways ideas suggestions
improve increase enhance
want wish
difference distinction
country nation
woman lady
women ladies
man guy
men guys
money cash
job work
company firm
thing stuff
effect impact
effects impacts
important significant
famous popular
create make build develop
remove delete
recover restore retrieve
change modify edit
choose select pick
talk speak
answer reply
trip travel
holiday vacation
tv television
us usa america
pc computer
bike motorcycle motorbike
book novel
most more
seen ever
""".strip().splitlines()
)

# Small words that turn a question around.
FACING: Final = frozenset(
    (("to", "from"), ("he", "she"), ("his", "her"), ("him", "her"), ("before", "after"), ("above", "below"))
)

PRONOUNS: Final = _words(
    "it its that this these those they them their he him his she her one ones former latter same above previous again "
    "another other"
)
CONTINUATIONS: Final = _words("and or but so also then ok okay yes no continue more explain elaborate go next thanks")

TIME_SENSITIVE: Final = _words(
    "today tomorrow yesterday tonight now currently current latest newest recent recently upcoming nowadays breaking live "
    "weather forecast news stock price prices exchange rate score scores trending heute morgen gestern jetzt aujourd'hui "
    "demain hier maintenant hoy mañana ayer ahora"
)
