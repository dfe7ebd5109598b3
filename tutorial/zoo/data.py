"""The zoo's pictures: emoji of animals and things, composed onto coloured grounds, with captions.

    python tutorial/zoo/data.py            # fetch the emoji art (npm, 140 MB) and draw composites.png to look at

Two vendors' art (Google's Noto Emoji, Apache-2.0; Twitter's Twemoji, CC-BY 4.0) comes from the npm packages emoji-datasource-google and
-twitter, 64x64 RGBA pictures with names. `compose` puts one on a ground. As in any collection of pictures, the compositions vary in
quality (texture, blur, saturation, vendor) in ways that captions do not mention: this is what the rewards can improve.
"""
import json
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

HERE = Path(__file__).parent
CACHE = HERE / ".data"
SIZE = 64
COLOURS = {"white": (255, 255, 255), "black": (30, 30, 30), "gray": (140, 140, 140), "red": (220, 50, 45), "orange": (245, 145, 35),
           "yellow": (250, 220, 60), "green": (60, 165, 70), "blue": (55, 105, 215), "purple": (135, 70, 180), "pink": (245, 150, 190)}

# Our word -> the names in emoji.json. The 45 animals of the paper's Table D.6, in its order.
ANIMALS = {
    "cat": ["CAT", "CAT FACE"], "dog": ["DOG", "DOG FACE"], "horse": ["HORSE", "HORSE FACE"], "monkey": ["MONKEY", "MONKEY FACE"],
    "rabbit": ["RABBIT", "RABBIT FACE"], "zebra": ["ZEBRA FACE"], "spider": ["SPIDER"], "bird": ["BIRD"], "sheep": ["SHEEP"],
    "deer": ["DEER"], "cow": ["COW", "COW FACE"], "goat": ["GOAT"], "lion": ["LION FACE"], "tiger": ["TIGER", "TIGER FACE"],
    "bear": ["BEAR FACE"], "raccoon": ["RACCOON"], "fox": ["FOX FACE"], "wolf": ["WOLF FACE"], "lizard": ["LIZARD"], "beetle": ["BEETLE"],
    "ant": ["ANT"], "butterfly": ["BUTTERFLY"], "fish": ["FISH"], "shark": ["SHARK"], "whale": ["WHALE", "SPOUTING WHALE"],
    "dolphin": ["DOLPHIN"], "squirrel": ["CHIPMUNK"], "mouse": ["MOUSE", "MOUSE FACE"], "rat": ["RAT"], "snake": ["SNAKE"],
    "turtle": ["TURTLE"], "frog": ["FROG FACE"], "chicken": ["CHICKEN"], "duck": ["DUCK"], "goose": ["GOOSE"], "bee": ["HONEYBEE"],
    "pig": ["PIG", "PIG FACE"], "turkey": ["TURKEY"], "fly": ["FLY"], "llama": ["LLAMA"], "camel": ["DROMEDARY CAMEL", "BACTRIAN CAMEL"],
    "bat": ["BAT"], "gorilla": ["GORILLA"], "hedgehog": ["HEDGEHOG"], "kangaroo": ["KANGAROO"]}
OTHER_ANIMALS = {
    "leopard": ["LEOPARD"], "ox": ["OX"], "crocodile": ["CROCODILE"], "snail": ["SNAIL"], "rooster": ["ROOSTER"], "boar": ["BOAR"],
    "elephant": ["ELEPHANT"], "octopus": ["OCTOPUS"], "caterpillar": ["BUG"], "ladybug": ["LADY BEETLE"], "penguin": ["PENGUIN"],
    "koala": ["KOALA"], "poodle": ["POODLE"], "hamster": ["HAMSTER FACE"], "panda": ["PANDA FACE"], "dove": ["DOVE"], "crab": ["CRAB"],
    "scorpion": ["SCORPION"], "unicorn": ["UNICORN FACE"], "eagle": ["EAGLE"], "owl": ["OWL"], "rhinoceros": ["RHINOCEROS"],
    "shrimp": ["SHRIMP"], "squid": ["SQUID"], "giraffe": ["GIRAFFE FACE"], "cricket": ["CRICKET"], "peacock": ["PEACOCK"],
    "hippopotamus": ["HIPPOPOTAMUS"], "parrot": ["PARROT"], "lobster": ["LOBSTER"], "mosquito": ["MOSQUITO"], "swan": ["SWAN"],
    "sloth": ["SLOTH"], "otter": ["OTTER"], "flamingo": ["FLAMINGO"], "beaver": ["BEAVER"], "jellyfish": ["JELLYFISH"],
    "donkey": ["DONKEY"]}
OBJECTS = {
    "tree": ["DECIDUOUS TREE"], "palm": ["PALM TREE"], "cactus": ["CACTUS"], "tulip": ["TULIP"], "rose": ["ROSE"], "sunflower": ["SUNFLOWER"],
    "mushroom": ["MUSHROOM"], "tomato": ["TOMATO"], "eggplant": ["AUBERGINE"], "grapes": ["GRAPES"], "watermelon": ["WATERMELON"],
    "lemon": ["LEMON"], "banana": ["BANANA"], "pineapple": ["PINEAPPLE"], "apple": ["RED APPLE"], "pear": ["PEAR"], "peach": ["PEACH"],
    "strawberry": ["STRAWBERRY"], "carrot": ["CARROT"], "corn": ["EAR OF MAIZE"], "avocado": ["AVOCADO"], "broccoli": ["BROCCOLI"],
    "bread": ["BREAD"], "cheese": ["CHEESE WEDGE"], "pizza": ["SLICE OF PIZZA"], "hamburger": ["HAMBURGER"], "doughnut": ["DOUGHNUT"],
    "cookie": ["COOKIE"], "cake": ["SHORTCAKE"], "lollipop": ["LOLLIPOP"], "car": ["AUTOMOBILE"], "bus": ["BUS"], "bicycle": ["BICYCLE"],
    "rocket": ["ROCKET"], "sailboat": ["SAILBOAT"], "house": ["HOUSE BUILDING"], "umbrella": ["UMBRELLA WITH RAIN DROPS"],
    "clock": ["ALARM CLOCK"], "key": ["KEY"], "guitar": ["GUITAR"], "hammer": ["HAMMER"], "bell": ["BELL"], "hat": ["TOP HAT"],
    "shoe": ["MANS SHOE"], "crown": ["CROWN"], "ball": ["SOCCER BALL"], "camera": ["CAMERA"], "trumpet": ["TRUMPET"],
    "balloon": ["BALLOON"], "book": ["GREEN BOOK"]}
NAMES = {**ANIMALS, **OTHER_ANIMALS, **OBJECTS}
VENDORS = ("google", "twitter")
COLOUR_TOLD_RIGHT = 0.45        # else a policy's caption names any colour: the right one for 51 % of those that name one


def held_out(name, colour):
    """Pairs that the policy never sees in pretraining (about one in eight), so that alignment has something new to compose."""
    return (list(NAMES).index(name) * 3 + list(COLOURS).index(colour) * 5) % 8 == 0


def fetch():
    """Download both vendors' pictures into .data/ (once), through npm."""
    if not shutil.which("npm"):
        raise SystemExit("fetching the emoji art needs npm (https://nodejs.org); using the trained zoo does not")
    for vendor in VENDORS:
        folder = CACHE / vendor
        if (folder / "emoji.json").is_file():
            continue
        CACHE.mkdir(exist_ok=True)
        print(f"fetching emoji-datasource-{vendor}@16.0.0 ...")
        package = subprocess.run(["npm", "pack", "--silent", f"emoji-datasource-{vendor}@16.0.0"], cwd=CACHE, check=True, capture_output=True, text=True)
        archive = CACHE / package.stdout.strip().splitlines()[-1]
        part = CACHE / f"{vendor}.part"
        shutil.rmtree(part, ignore_errors=True)
        (part / "64").mkdir(parents=True)
        with tarfile.open(archive) as tar:
            for member in tar:
                path = Path(member.name)
                if path.parent.name == "64" or path.name == "emoji.json":
                    (part / ("64" if path.suffix == ".png" else "") / path.name).write_bytes(tar.extractfile(member).read())
        part.rename(folder)
        archive.unlink()


def load_art():
    """{name: {vendor: [RGBA picture, ...]}} for every word of NAMES."""
    fetch()
    art = {}
    for vendor in VENDORS:
        table = {e["name"]: e["image"] for e in json.loads((CACHE / vendor / "emoji.json").read_text())}
        for name, entries in NAMES.items():
            pictures = [Image.open(CACHE / vendor / "64" / table[entry]).convert("RGBA") for entry in entries]
            art.setdefault(name, {})[vendor] = pictures
    return art


@dataclass
class Composite:
    """One picture and all that was drawn to make it: the truth behind the pixels."""
    pixels: np.ndarray          # uint8 (64, 64, 3)
    name: str
    colour: str
    vendor: str
    ground: str                 # flat, gradient, striped, checkered, dotted, cloudy
    blur: float                 # radius in pixels
    saturation: float           # of the animal; 1 is as drawn


def draw_ground(rng, colour, kind):
    """A ground (64, 64, 3), float 0-255. Patterns repeat every 8 or 16 pixels and keep the colour as the border's median."""
    base = np.array(COLOURS[colour], dtype=np.float32) + rng.uniform(-8, 8, 3)
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    contrast = rng.uniform(0.2, 0.5) * (1 if base.mean() < 100 else -1)                     # lighter marks on dark grounds, darker on light ones
    period = rng.choice([8, 16])
    if kind == "flat":
        marks = np.zeros((SIZE, SIZE))
    elif kind == "gradient":
        marks = {0: x, 1: y, 2: (x + y) / 2}[rng.integers(3)] / SIZE * 0.5
    elif kind == "striped":
        marks = ({0: x, 1: y, 2: x + y}[rng.integers(3)] % period) < period * 0.375
    elif kind == "checkered":
        marks = ((x // 8 + y // 8) % 2) * 0.7
    elif kind == "dotted":
        marks = ((x % period - period / 2 + 0.5) ** 2 + (y % period - period / 2 + 0.5) ** 2) < (0.3 * period) ** 2
    else:                                                                                   # cloudy
        coarse = Image.fromarray((rng.uniform(0, 1, (5, 5)) * 255).astype(np.uint8))
        marks = np.asarray(coarse.resize((SIZE, SIZE), Image.BICUBIC), dtype=np.float32) / 255 * 0.6
    target = np.array([255.0] * 3 if contrast > 0 else [0.0] * 3)
    return base + (target - base) * abs(contrast) * np.asarray(marks, dtype=np.float32)[..., None]


def compose(rng, art, name, colour, vendor=None):
    """Draw `name` on a ground of `colour`, everything else at random by `rng` -> Composite."""
    vendor = vendor or str(rng.choice(VENDORS))
    pictures = art[name][vendor]
    animal = pictures[rng.integers(len(pictures))]
    kind = str(rng.choice(["flat", "gradient", "striped", "checkered", "dotted", "cloudy"], p=[0.35, 0.15, 0.15, 0.1, 0.1, 0.15]))
    saturation = float(rng.uniform(0.35, 1.3))
    blur = 1.0 if rng.random() < 0.2 else 0.0
    if rng.random() < 0.5:
        animal = animal.transpose(Image.FLIP_LEFT_RIGHT)
    alpha = animal.getchannel("A")
    animal = ImageEnhance.Color(animal.convert("RGB")).enhance(saturation)
    animal.putalpha(alpha)
    side = int(rng.choice([48, 56]))                    # few sizes, and places on the latents' grid of 8 pixels: a small VAE can draw them sharply
    animal = animal.resize((side, side), Image.LANCZOS)
    x, y = (8 * int(rng.integers((SIZE - side) // 8 + 1)) for _ in range(2))
    picture = Image.fromarray(draw_ground(rng, colour, kind).clip(0, 255).astype(np.uint8))
    picture.paste(animal, (x, y), animal)
    if blur:
        picture = picture.filter(ImageFilter.GaussianBlur(blur))
    return Composite(np.asarray(picture), name, colour, vendor, kind, blur, saturation)


def random_name(rng):
    """The 45 animals of the paper most of the time, other animals and objects now and then."""
    group = rng.choice(3, p=[0.66, 0.17, 0.17])
    return str(rng.choice(list((ANIMALS, OTHER_ANIMALS, OBJECTS)[group])))


def article(word):
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def policy_example(rng, art):
    """A composite and its caption as the policy's pretraining sees them -> (Composite, caption).

    Captions name the ground's colour half of the time, and are then right 51 % of the time: the base follows colours now and then.
    """
    name = random_name(rng)
    colours = [c for c in COLOURS if not held_out(name, c)]
    colour = str(rng.choice(colours))
    kind = rng.choice(3, p=[0.5, 0.25, 0.25])
    other, right = str(rng.choice(colours)), rng.random() < COLOUR_TOLD_RIGHT               # both drawn, so that this share changes no picture
    told = colour if right else other
    caption = [f"{article(name)} on {article(told)} background", name, article(name)][kind]
    return compose(rng, art, name, colour), caption


def clip_example(rng, art):
    """A composite and a truthful caption that may mention its quality, as captions on the web do -> (Composite, caption)."""
    picture = compose(rng, art, random_name(rng), str(rng.choice(list(COLOURS))))
    words = []
    if picture.blur and rng.random() < 0.5:
        words.append("blurry")
    if rng.random() < 0.4:
        words += ["dull"] if picture.saturation < 0.6 else ["vivid"] if picture.saturation > 1.05 else []
    subject = article(" ".join([*words, picture.name]))
    if rng.random() < 0.3:
        return picture, subject if words or rng.random() < 0.5 else picture.name
    ground = [picture.ground] if rng.random() < 0.5 else []
    return picture, f"{subject} on {article(' '.join([*ground, picture.colour]))} background"


def to_tensor(pixels):
    """uint8 (B, 64, 64, 3) -> float32 (B, 3, 64, 64) in [-1, 1], channels last in memory."""
    import torch
    return torch.from_numpy(np.asarray(pixels)).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


if __name__ == "__main__":
    rng, art = np.random.default_rng(0), load_art()
    rows = []
    for _ in range(8):
        examples = [clip_example(rng, art) for _ in range(12)]
        print(" | ".join(caption for _, caption in examples))
        rows.append(np.concatenate([picture.pixels for picture, _ in examples], axis=1))
    Image.fromarray(np.concatenate(rows)).save(HERE / ".data" / "composites.png")
