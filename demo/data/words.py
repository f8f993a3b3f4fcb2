"""The word lists every generator draws from."""

import random
from dataclasses import dataclass


def _listed(text: str) -> list[str]:
    return text.split()


NAMES = _listed(
    """
Maria Tom Aisha Daniel Sofia Kenji Grace Omar Elena Lucas Priya Noah Anna Ben Chloe Ivan Emma Liam Olivia Ava
Mia Lily Jack Harry Oscar Leo Max Sam Alex Jamie Robin Kim Lee Jordan Taylor Morgan Casey Riley Avery Quinn
Peter Paul John James Mark Luke Simon Andrew Philip David Michael Steven Kevin Brian George Henry Edward Arthur
Sarah Laura Julia Nina Clara Eva Ida Rosa Lucia Carmen Isabel Teresa Paula Marta Irene Alba Nora Vera Olga Irina
Carlos Diego Pablo Javier Miguel Rafael Luis Jorge Mateo Bruno Marco Luca Paolo Giulia Chiara Elisa Franco Dario
Pierre Claire Camille Louis Hugo Manon Julien Antoine Margot Celine Hans Greta Karl Heidi Jonas Lena Felix Katja
Lars Ingrid Sven Astrid Erik Freya Nils Anders Karin Mikko Aino Jan Piet Femke Daan Sanne Marek Zofia Pavel Hana
Ahmed Fatima Yusuf Leila Hassan Amina Karim Salma Tariq Zainab Ali Noor Rami Dina Samir Mona Ravi Anjali Arjun
Meera Vikram Neha Sanjay Lakshmi Rohan Kavya Dev Asha Wei Li Mei Chen Ling Hao Yan Jun Xiu Yuki Haruto Sakura
Hiro Aiko Naoki Emi Min Jisoo Hyun Sora Linh Minh Thu Nam Putri Budi Siti Agus Kwame Ama Kofi Abena Chidi Ngozi
Emeka Ada Thabo Zanele Sipho Lerato Amara Tunde Juma Wanjiru Baraka Neema Tane Aroha Koa Leilani Ruth Esther Miriam
Adam Eli Jacob Rachel Leah Hannah Naomi Ethan Caleb Joel Toby Ruby Pearl Iris Violet Hazel Ivy Rose Daisy Holly
    """
)

_ONSETS = _listed("b br ch d dr f g gr h j k kl l m n p r s sh st t tr v w y z")
_VOWELS = _listed("a e i o u ai ea ia io")
_CODAS = ["", "", "", "n", "r", "l", "s", "m", "th", "k"]

CITIES = _listed(
    """
Paris London Berlin Madrid Rome Lisbon Oslo Vienna Prague Dublin Athens Warsaw Helsinki Stockholm Brussels Budapest
Tokyo Osaka Seoul Beijing Shanghai Delhi Mumbai Bangkok Hanoi Jakarta Manila Singapore Sydney Melbourne Auckland
Cairo Nairobi Lagos Accra Dakar Tunis Lima Bogota Quito Santiago Montreal Toronto Vancouver Chicago Boston Denver
Seattle Austin Dallas Miami Atlanta Phoenix Portland Geneva Zurich Milan Naples Porto Seville Lyon Munich Hamburg
    """
)

COUNTRIES = _listed(
    """
France Spain Italy Germany Norway Japan Kenya Peru Canada Brazil India China Egypt Greece Poland Chile Ghana Iceland
Mexico Turkey Sweden Finland Ireland Portugal Austria Morocco Vietnam Thailand Australia
    """
)

TIMES = [
    time
    for line in """
today|tonight|tomorrow|tomorrow morning|tomorrow afternoon|this morning|this afternoon|this week|next week
on Monday|on Tuesday|on Wednesday|on Thursday|on Friday|on Monday morning|on Tuesday morning|on Wednesday afternoon
on Thursday afternoon|on Friday morning|by Monday|by Tuesday|by Wednesday|by Thursday|by Friday|by tomorrow
by the end of the day|by the end of the week|before lunch|after lunch|before noon|in two days|in three days
in a few days|early next week|later today|later this week|at the start of next week|within two days
""".splitlines()
    for time in line.split("|")
    if time
]


@dataclass(frozen=True)
class TopicFamily:
    """Nouns of one kind, the words that fit before them, and whether they are plural."""

    kind: str
    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]
    plurals: tuple[str, ...] = ()


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


TOPIC_FAMILIES = (
    TopicFamily(
        "document",
        _words(
            "late, new, first, final, signed, missing, updated, short, long, annual, monthly, weekly, old, open, "
            "second, revised, unpaid, printed, draft, project, sales, travel, budget, price, staff, client"
        ),
        _words(
            "invoice, report, contract, draft, proposal, summary, letter, form, list, plan, budget, receipt, "
            "agenda, survey, schedule, offer, review, quote, manual, brochure, article, essay, file, permit, "
            "certificate, application, statement, document, newsletter, album, website, page"
        ),
        _words("slides, figures, notes, minutes, photos, papers, numbers, results, documents, forms"),
    ),
    TopicFamily(
        "thing",
        _words(
            "broken, slow, noisy, old, new, lost, spare, blue, red, green, small, large, heavy, office, kitchen, "
            "garden, cracked, shared, missing, wet, dusty, black, white, wooden"
        ),
        _words(
            "printer, laptop, phone, lamp, chair, desk, heater, fan, camera, projector, screen, keyboard, bike, "
            "car, window, door, key, badge, coffee machine, fridge, router, scanner, headset, tablet, bag, umbrella, "
            "jacket, clock, shelf, sofa, table, radio, oven, bottle"
        ),
        _words("keys, speakers, lights, chairs, cables, boxes, batteries, tools, plants, shoes"),
    ),
    TopicFamily(
        "event",
        _words(
            "team, budget, weekly, monthly, annual, first, next, spring, summer, autumn, winter, office, project, "
            "training, family, school, garden, planning, Monday, Friday, morning, evening, book, music, short, online"
        ),
        _words(
            "meeting, lunch, dinner, party, call, workshop, course, visit, interview, trip, class, concert, picnic, "
            "conference, talk, walk, tour, club, event, game, holiday, move, breakfast, festival, seminar, lesson, "
            "reunion, wedding, birthday"
        ),
    ),
    TopicFamily(
        "order",
        _words(
            "late, delayed, missing, wrong, damaged, large, small, last, second, new, online, returned, express, "
            "cancelled, double, hotel, train, flight, ticket, gift, paper, furniture, book, free"
        ),
        _words(
            "order, parcel, delivery, refund, booking, payment, shipment, package, reservation, subscription, "
            "return, ticket, voucher, deposit, gift, purchase, upgrade, room"
        ),
        _words("tickets, books, samples, flowers, goods, parts, supplies"),
    ),
    TopicFamily(
        "issue",
        _words(
            "small, new, strange, login, billing, network, printer, parking, heating, water, noise, open, old, "
            "serious, common, security, schedule, email, sound, price"
        ),
        _words(
            "problem, question, mistake, error, delay, complaint, issue, change, request, idea, bug, mix-up, "
            "leak, update, password, account, warning, policy, rule"
        ),
        _words("problems, questions, changes, errors, updates, delays"),
    ),
)

FREE_WORDS = _listed(
    """
river mountain violin guitar piano tomato potato apple cherry lemon bread cheese pasta honey butter candle curtain
blanket pillow mirror ladder hammer bucket fence roof cellar attic balcony bridge harbor island forest meadow valley
rabbit horse pigeon turtle salmon whale spider butterfly engine rocket satellite planet comet crystal marble copper
silver cotton velvet leather ribbon button needle thread scissors notebook pencil crayon canvas statue museum library
theater stadium airport station ferry tram scooter helmet glove scarf boot sock hat coat dress costume mask puppet
dragon castle tower village market bakery pharmacy clinic hospital kindergarten college choir orchestra poem novel
recipe puzzle riddle contest award medal banner flag poster sticker calendar map compass lantern tent kayak paddle
    """
)


@dataclass(frozen=True)
class Topic:
    """What an email is about: "the late invoice", with its kind and number."""

    kind: str
    core: str
    is_plural: bool = False

    @property
    def the(self) -> str:
        return f"the {self.core}"

    @property
    def verb_is(self) -> str:
        return "are" if self.is_plural else "is"

    @property
    def it(self) -> str:
        return "them" if self.is_plural else "it"


def name(rng: random.Random) -> str:
    """A first name; one in eight is invented, so that copying a name is learned letter by letter."""
    if rng.random() < 0.875:
        return rng.choice(NAMES)
    syllables = [
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(rng.choice((2, 2, 3)))
    ]
    return "".join(syllables).capitalize()


def topic(rng: random.Random) -> Topic:
    """A topic from the families; one in six joins two free words instead."""
    if rng.random() < 1 / 6:
        return Topic("free", f"{rng.choice(FREE_WORDS)} {rng.choice(FREE_WORDS)}")
    family = rng.choice(TOPIC_FAMILIES)
    is_plural = bool(family.plurals) and rng.random() < 0.2
    noun = rng.choice(family.plurals if is_plural else family.nouns)
    if rng.random() < 0.15:
        return Topic(family.kind, noun, is_plural)
    adjective = rng.choice(family.adjectives)
    if adjective in noun:
        return Topic(family.kind, noun, is_plural)
    return Topic(family.kind, f"{adjective} {noun}", is_plural)
