"""The zoo's pictures: emoji of animals and things, composed onto coloured grounds, with captions.

    python tutorial/zoo/data.py    # fetch the art (npm, 140 MB once), draw .data/composites.png

Two vendors' art (Google's Noto Emoji, Apache-2.0; Twitter's Twemoji, CC-BY 4.0) comes from the npm
packages emoji-datasource-google and -twitter: 64x64 RGBA pictures with names. `compose` puts one on
a ground. As in any collection of pictures, the compositions vary in quality (texture, blur,
saturation, vendor) in ways that captions do not mention: this is what the rewards can improve.
"""

import argparse
import json
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

HERE = Path(__file__).parent
SIZE = 64
VENDORS = ("google", "twitter")
COLOURS = {
    "white": (255, 255, 255),
    "black": (30, 30, 30),
    "gray": (140, 140, 140),
    "red": (220, 50, 45),
    "orange": (245, 145, 35),
    "yellow": (250, 220, 60),
    "green": (60, 165, 70),
    "blue": (55, 105, 215),
    "purple": (135, 70, 180),
    "pink": (245, 150, 190),
}

# The 45 animals of the paper's App. D.6, in its order; as many others and things as its unseen ones
ANIMALS = """
cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf
lizard beetle ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken
duck goose bee pig turkey fly llama camel bat gorilla hedgehog kangaroo
""".split()
OTHER_ANIMALS = """
leopard ox crocodile snail rooster boar elephant octopus caterpillar ladybug penguin koala poodle
hamster panda dove crab scorpion unicorn eagle owl rhinoceros shrimp squid giraffe cricket peacock
hippopotamus parrot lobster mosquito swan sloth otter flamingo beaver jellyfish donkey
""".split()
OBJECTS = """
tree palm cactus tulip rose sunflower mushroom tomato eggplant grapes watermelon lemon banana
pineapple apple pear peach strawberry carrot corn avocado broccoli bread cheese pizza hamburger
doughnut cookie cake lollipop car bus bicycle rocket sailboat house umbrella clock key guitar hammer
bell hat shoe crown ball camera trumpet balloon book
""".split()
NAMES = [*ANIMALS, *OTHER_ANIMALS, *OBJECTS]

# What emoji.json calls a thing, where that is not our word in capitals.
EMOJI = {
    "cat": ["CAT", "CAT FACE"],
    "dog": ["DOG", "DOG FACE"],
    "horse": ["HORSE", "HORSE FACE"],
    "monkey": ["MONKEY", "MONKEY FACE"],
    "rabbit": ["RABBIT", "RABBIT FACE"],
    "zebra": ["ZEBRA FACE"],
    "cow": ["COW", "COW FACE"],
    "lion": ["LION FACE"],
    "tiger": ["TIGER", "TIGER FACE"],
    "bear": ["BEAR FACE"],
    "fox": ["FOX FACE"],
    "wolf": ["WOLF FACE"],
    "whale": ["WHALE", "SPOUTING WHALE"],
    "squirrel": ["CHIPMUNK"],
    "mouse": ["MOUSE", "MOUSE FACE"],
    "frog": ["FROG FACE"],
    "bee": ["HONEYBEE"],
    "pig": ["PIG", "PIG FACE"],
    "camel": ["DROMEDARY CAMEL", "BACTRIAN CAMEL"],
    "caterpillar": ["BUG"],
    "ladybug": ["LADY BEETLE"],
    "hamster": ["HAMSTER FACE"],
    "panda": ["PANDA FACE"],
    "unicorn": ["UNICORN FACE"],
    "giraffe": ["GIRAFFE FACE"],
    "tree": ["DECIDUOUS TREE"],
    "palm": ["PALM TREE"],
    "eggplant": ["AUBERGINE"],
    "apple": ["RED APPLE"],
    "corn": ["EAR OF MAIZE"],
    "cheese": ["CHEESE WEDGE"],
    "pizza": ["SLICE OF PIZZA"],
    "cake": ["SHORTCAKE"],
    "car": ["AUTOMOBILE"],
    "house": ["HOUSE BUILDING"],
    "umbrella": ["UMBRELLA WITH RAIN DROPS"],
    "clock": ["ALARM CLOCK"],
    "hat": ["TOP HAT"],
    "shoe": ["MANS SHOE"],
    "ball": ["SOCCER BALL"],
    "book": ["GREEN BOOK"],
}

# What the paper's animals do in its Sec. 6.3; the zoo cannot draw it.
ACTIVITIES = ["washing dishes", "riding a bike", "playing chess"]

# What a small policy draws worst: it is shown more often.
HARD = """
beetle whale dolphin snake bird turtle fish ant shark lizard duck turkey bat kangaroo fly rat camel
goat
""".split()
HARD_SHARE = 0.25  # of the policy's pictures of anything else are of one of these instead

# Else a policy's caption names any colour: the right one for 51 % of those that name one.
COLOUR_TOLD_RIGHT = 0.45

GROUNDS = {  # kind: share of the composites
    "flat": 0.35,
    "gradient": 0.15,
    "striped": 0.15,
    "checkered": 0.1,
    "dotted": 0.1,
    "cloudy": 0.15,
}


def options(description, argv=None):
    """What every script of the zoo can be told on the command line -> .zoo, .device, .quick."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    zoo = "the folder that networks are read from and written to [%(default)s]; its .data: the art"
    parser.add_argument("--zoo", type=Path, metavar="FOLDER", default=HERE, help=zoo)
    device = "where networks compute: cpu, cuda ... [%(default)s]; batches are drawn on the CPU"
    parser.add_argument("--device", default="cpu", help=device)
    quick = "two steps on a few pictures: does it run? Needs a --zoo of its own"
    parser.add_argument("--quick", action="store_true", help=quick)
    given = parser.parse_args(argv)
    if given.quick and given.zoo.resolve() == HERE.resolve():
        parser.error("--quick needs --zoo FOLDER: it would overwrite the zoo that is here")
    return given


def held_out(name, colour):
    """Pairs that the policy's pretraining never sees, about one in eight -> bool.

    So that alignment has something new to compose.
    """
    return (NAMES.index(name) * 3 + list(COLOURS).index(colour) * 5) % 8 == 0


def has_art(zoo=HERE):
    """Are both vendors' pictures in `zoo`/.data already?"""
    return all((zoo / ".data" / vendor / "emoji.json").is_file() for vendor in VENDORS)


def fetch(zoo=HERE):
    """Download both vendors' pictures into `zoo`/.data, once, through npm."""
    for vendor in VENDORS:
        folder = zoo / ".data" / vendor
        if (folder / "emoji.json").is_file():
            continue
        if not shutil.which("npm"):
            raise SystemExit(
                "fetching the emoji art needs npm (https://nodejs.org); using the trained zoo does "
                "not"
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        print(f"fetching emoji-datasource-{vendor}@16.0.0 ...")
        command = ["npm", "pack", "--silent", f"emoji-datasource-{vendor}@16.0.0"]
        packed = subprocess.run(
            command, cwd=folder.parent, check=True, capture_output=True, text=True
        )
        archive = folder.parent / packed.stdout.strip().splitlines()[-1]
        unpack(archive, folder)
        archive.unlink()


def unpack(archive, folder):
    """The table and the pictures of 64 pixels in a vendor's package -> `folder`, when whole."""
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    (part / "64").mkdir(parents=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            path = Path(member.name)
            if path.parent.name == "64" or path.name == "emoji.json":
                target = part / "64" if path.suffix == ".png" else part
                (target / path.name).write_bytes(tar.extractfile(member).read())
    part.rename(folder)


def load_art(zoo=HERE):
    """{name: {vendor: [RGBA picture, ...]}} for every word of NAMES, fetched where need be."""
    fetch(zoo)
    art = {name: {} for name in NAMES}
    for vendor in VENDORS:
        folder = zoo / ".data" / vendor
        entries = json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
        files = {entry["name"]: folder / "64" / entry["image"] for entry in entries}
        for name in NAMES:
            pictures = EMOJI.get(name, [name.upper()])
            art[name][vendor] = [Image.open(files[entry]).convert("RGBA") for entry in pictures]
    return art


@dataclass
class Composite:
    """One picture and all that was drawn to make it: the truth behind the pixels."""

    pixels: np.ndarray  # uint8 (64, 64, 3)
    name: str
    colour: str
    vendor: str
    ground: str  # one of GROUNDS
    blur: float  # radius in pixels
    saturation: float  # of the animal; 1 is as drawn


def draw_marks(rng, kind, period):
    """A ground's pattern, which repeats every `period` pixels: 0 to 1, (64, 64)."""
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    if kind == "flat":
        return np.zeros((SIZE, SIZE))
    if kind == "gradient":
        return (x, y, (x + y) / 2)[rng.integers(3)] / SIZE * 0.5
    if kind == "striped":
        return ((x, y, x + y)[rng.integers(3)] % period) < period * 0.375
    if kind == "checkered":
        return ((x // 8 + y // 8) % 2) * 0.7
    if kind == "dotted":
        across, down = x % period - period / 2 + 0.5, y % period - period / 2 + 0.5
        return across**2 + down**2 < (0.3 * period) ** 2
    cloudy = Image.fromarray((rng.uniform(0, 1, (5, 5)) * 255).astype(np.uint8))
    smooth = cloudy.resize((SIZE, SIZE), Image.BICUBIC)
    return np.asarray(smooth, dtype=np.float32) / 255 * 0.6


def draw_ground(rng, colour, kind):
    """A ground, uint8 (64, 64, 3). Patterns keep the colour as the border's median.

    Their marks are lighter on dark grounds, darker on light ones.
    """
    base = np.array(COLOURS[colour], dtype=np.float32) + rng.uniform(-8, 8, 3)
    contrast = rng.uniform(0.2, 0.5)
    target = np.full(3, 255.0 if base.mean() < 100 else 0.0)
    marks = np.asarray(draw_marks(rng, kind, rng.choice([8, 16])), dtype=np.float32)
    ground = base + (target - base) * contrast * marks[..., None]
    return ground.clip(0, 255).astype(np.uint8)


def compose(rng, art, name, colour, vendor=None, varied=True):
    """Draw `name` on a ground of `colour`, everything else at random by `rng` -> Composite.

    There are few sizes, and places on the latents' grid of 8 pixels: a small VAE can draw them
    sharply. Not varied: one pose, one size, no mirror image, for what no caption tells apart a
    small policy mixes.
    """
    vendor = vendor or str(rng.choice(VENDORS))
    pictures = art[name][vendor]
    animal = pictures[rng.integers(len(pictures))] if varied else pictures[-1]  # a face, if any
    kind = str(rng.choice(list(GROUNDS), p=list(GROUNDS.values())))
    saturation = float(rng.uniform(0.35, 1.3))
    blur = 1.0 if rng.random() < 0.2 else 0.0
    if varied and rng.random() < 0.5:
        animal = animal.transpose(Image.FLIP_LEFT_RIGHT)
    alpha = animal.getchannel("A")
    animal = ImageEnhance.Color(animal.convert("RGB")).enhance(saturation)
    animal.putalpha(alpha)
    side = int(rng.choice([48, 56])) if varied else 56
    animal = animal.resize((side, side), Image.LANCZOS)
    place = 8 * rng.integers((SIZE - side) // 8 + 1, size=2)
    picture = Image.fromarray(draw_ground(rng, colour, kind))
    picture.paste(animal, tuple(place.tolist()), animal)
    if blur:
        picture = picture.filter(ImageFilter.GaussianBlur(blur))
    return Composite(np.asarray(picture), name, colour, vendor, kind, blur, saturation)


def random_name(rng):
    """The 45 animals of the paper most of the time, other animals and objects now and then."""
    group = rng.choice(3, p=[0.66, 0.17, 0.17])
    return str(rng.choice((ANIMALS, OTHER_ANIMALS, OBJECTS)[group]))


def random_colour(rng):
    """Any of the ten."""
    return str(rng.choice(list(COLOURS)))


def article(word):
    """cat -> a cat; ant -> an ant."""
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def on_ground(name, colour):
    """The whole caption: "a cat on a red background"."""
    return f"{article(name)} on {article(colour)} background"


def policy_word(rng):
    """What a picture of the policy's pretraining shows: hard things more often than others."""
    name = random_name(rng)
    if name not in HARD and rng.random() < HARD_SHARE:
        name = str(rng.choice(HARD))
    return name


def policy_example(rng, art, name=None, vendor=None):
    """A composite and its caption as the policy's pretraining sees them -> Composite, caption.

    Captions name the ground's colour half of the time, and are then right 51 % of the time: the
    base follows colours now and then. `name`, `vendor`: of what, where it isn't left to chance.
    """
    name = name or policy_word(rng)
    colours = [c for c in COLOURS if not held_out(name, c)]
    colour = str(rng.choice(colours))
    kind = rng.choice(3, p=[0.5, 0.25, 0.25])
    # both are drawn, so that this share changes no picture
    other, right = str(rng.choice(colours)), rng.random() < COLOUR_TOLD_RIGHT
    told = colour if right else other
    caption = [on_ground(name, told), name, article(name)][kind]
    return compose(rng, art, name, colour, vendor, varied=False), caption


def clip_example(rng, art):
    """A composite and a truthful caption -> Composite, caption.

    It may mention the picture's quality, as captions on the web do.
    """
    picture = compose(rng, art, random_name(rng), random_colour(rng))
    words = []
    if picture.blur and rng.random() < 0.5:
        words.append("blurry")
    if rng.random() < 0.4:
        if picture.saturation < 0.6:
            words.append("dull")
        elif picture.saturation > 1.05:
            words.append("vivid")
    subject = " ".join([*words, picture.name])
    if rng.random() < 0.3:
        whole = words or rng.random() < 0.5
        return picture, article(subject) if whole else picture.name
    ground = [picture.ground] if rng.random() < 0.5 else []
    return picture, on_ground(subject, " ".join([*ground, picture.colour]))


def sheet(images, columns):
    """Pictures in rows of `columns`, of which the last is full. B of (H, W, 3) -> one."""
    rows = [list(images[i : i + columns]) for i in range(0, len(images), columns)]
    return np.concatenate([np.concatenate(row, axis=1) for row in rows])


def to_tensor(pixels, device="cpu"):
    """uint8 (B, 64, 64, 3) -> float32 (B, 3, 64, 64) in [-1, 1], channels last in memory."""
    import torch  # not above: drawing pictures needs none

    scaled = torch.tensor(np.asarray(pixels)).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    return scaled.contiguous(memory_format=torch.channels_last).to(device)


def main():
    """Eight rows of twelve pictures into .data/composites.png, and their captions."""
    zoo = options(__doc__).zoo
    rng, art = np.random.default_rng(0), load_art(zoo)
    images = []
    for _ in range(8):
        examples = [clip_example(rng, art) for _ in range(12)]
        print(" | ".join(caption for _, caption in examples))
        images += [picture.pixels for picture, _ in examples]
    Image.fromarray(sheet(images, 12)).save(zoo / ".data" / "composites.png")


if __name__ == "__main__":
    main()
