"""Rewards r(x_0, c) and the prompts they are earned on. Sec. 5 of the paper; App. D for the details.

A reward is any function  (images: uint8 numpy (B, H, W, 3), prompts: list of B str) -> scores: float numpy (B,).
It is never differentiated, so it may be anything: here, the size of a file.

Deviation from the paper: prompts may repeat within an epoch (`draw_prompts` with repeats > 1), which the zoo's few samples need.
"""
import io
from pathlib import Path

import numpy as np
from PIL import Image


def jpeg_kilobytes(image, quality=95):
    """Size of the image as a JPEG file, in kB of 1000 bytes. image uint8 (H, W, 3) -> float."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="JPEG", quality=quality)
    return file.tell() / 1000


def incompressibility(images, prompts):
    """Sec. 5.1: the size of the image as a JPEG of quality 95, in kB. uint8 (B, H, W, 3) -> (B,)."""
    return np.array([jpeg_kilobytes(image) for image in images])


def compressibility(images, prompts):
    """Sec. 5.1: minus the size of the image as a JPEG of quality 95, in kB. uint8 (B, H, W, 3) -> (B,)."""
    return -incompressibility(images, prompts)


REWARDS = {"compressibility": compressibility, "incompressibility": incompressibility}

# The 45 common animals of Table D.6, for the aesthetic reward.
COMMON_ANIMALS = """
cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard beetle ant butterfly fish shark
whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig turkey fly llama camel bat gorilla hedgehog kangaroo
""".split()

ACTIVITIES = ["washing dishes", "riding a bike", "playing chess"]

# The first 398 classes of ImageNet, all of them animals, for the two JPEG rewards.
IMAGENET_ANIMALS = " ".join("""
tench, Tinca tinca; goldfish, Carassius auratus; great white shark, white shark, man-eater, man-eating shark, Carcharodon carcharias;
tiger shark, Galeocerdo cuvieri; hammerhead, hammerhead shark; electric ray, crampfish, numbfish, torpedo; stingray; cock; hen; ostrich,
Struthio camelus; brambling, Fringilla montifringilla; goldfinch, Carduelis carduelis; house finch, linnet, Carpodacus mexicanus; junco,
snowbird; indigo bunting, indigo finch, indigo bird, Passerina cyanea; robin, American robin, Turdus migratorius; bulbul; jay; magpie;
chickadee; water ouzel, dipper; kite; bald eagle, American eagle, Haliaeetus leucocephalus; vulture; great grey owl, great gray owl, Strix
nebulosa; European fire salamander, Salamandra salamandra; common newt, Triturus vulgaris; eft; spotted salamander, Ambystoma maculatum;
axolotl, mud puppy, Ambystoma mexicanum; bullfrog, Rana catesbeiana; tree frog, tree-frog; tailed frog, bell toad, ribbed toad, tailed
toad, Ascaphus trui; loggerhead, loggerhead turtle, Caretta caretta; leatherback turtle, leatherback, leathery turtle, Dermochelys
coriacea; mud turtle; terrapin; box turtle, box tortoise; banded gecko; common iguana, iguana, Iguana iguana; American chameleon, anole,
Anolis carolinensis; whiptail, whiptail lizard; agama; frilled lizard, Chlamydosaurus kingi; alligator lizard; Gila monster, Heloderma
suspectum; green lizard, Lacerta viridis; African chameleon, Chamaeleo chamaeleon; Komodo dragon, Komodo lizard, dragon lizard, giant
lizard, Varanus komodoensis; African crocodile, Nile crocodile, Crocodylus niloticus; American alligator, Alligator mississipiensis;
triceratops; thunder snake, worm snake, Carphophis amoenus; ringneck snake, ring-necked snake, ring snake; hognose snake, puff adder, sand
viper; green snake, grass snake; king snake, kingsnake; garter snake, grass snake; water snake; vine snake; night snake, Hypsiglena
torquata; boa constrictor, Constrictor constrictor; rock python, rock snake, Python sebae; Indian cobra, Naja naja; green mamba; sea
snake; horned viper, cerastes, sand viper, horned asp, Cerastes cornutus; diamondback, diamondback rattlesnake, Crotalus adamanteus;
sidewinder, horned rattlesnake, Crotalus cerastes; trilobite; harvestman, daddy longlegs, Phalangium opilio; scorpion; black and gold
garden spider, Argiope aurantia; barn spider, Araneus cavaticus; garden spider, Aranea diademata; black widow, Latrodectus mactans;
tarantula; wolf spider, hunting spider; tick; centipede; black grouse; ptarmigan; ruffed grouse, partridge, Bonasa umbellus; prairie
chicken, prairie grouse, prairie fowl; peacock; quail; partridge; African grey, African gray, Psittacus erithacus; macaw; sulphur-crested
cockatoo, Kakatoe galerita, Cacatua galerita; lorikeet; coucal; bee eater; hornbill; hummingbird; jacamar; toucan; drake; red-breasted
merganser, Mergus serrator; goose; black swan, Cygnus atratus; tusker; echidna, spiny anteater, anteater; platypus, duckbill, duckbilled
platypus, duck-billed platypus, Ornithorhynchus anatinus; wallaby, brush kangaroo; koala, koala bear, kangaroo bear, native bear,
Phascolarctos cinereus; wombat; jellyfish; sea anemone, anemone; brain coral; flatworm, platyhelminth; nematode, nematode worm, roundworm;
conch; snail; slug; sea slug, nudibranch; chiton, coat-of-mail shell, sea cradle, polyplacophore; chambered nautilus, pearly nautilus,
nautilus; Dungeness crab, Cancer magister; rock crab, Cancer irroratus; fiddler crab; king crab, Alaska crab, Alaskan king crab, Alaska
king crab, Paralithodes camtschatica; American lobster, Northern lobster, Maine lobster, Homarus americanus; spiny lobster, langouste,
rock lobster, crawfish, crayfish, sea crawfish; crayfish, crawfish, crawdad, crawdaddy; hermit crab; isopod; white stork, Ciconia ciconia;
black stork, Ciconia nigra; spoonbill; flamingo; little blue heron, Egretta caerulea; American egret, great white heron, Egretta albus;
bittern; crane; limpkin, Aramus pictus; European gallinule, Porphyrio porphyrio; American coot, marsh hen, mud hen, water hen, Fulica
americana; bustard; ruddy turnstone, Arenaria interpres; red-backed sandpiper, dunlin, Erolia alpina; redshank, Tringa totanus; dowitcher;
oystercatcher, oyster catcher; pelican; king penguin, Aptenodytes patagonica; albatross, mollymawk; grey whale, gray whale, devilfish,
Eschrichtius gibbosus, Eschrichtius robustus; killer whale, killer, orca, grampus, sea wolf, Orcinus orca; dugong, Dugong dugon; sea lion;
Chihuahua; Japanese spaniel; Maltese dog, Maltese terrier, Maltese; Pekinese, Pekingese, Peke; Shih-Tzu; Blenheim spaniel; papillon; toy
terrier; Rhodesian ridgeback; Afghan hound, Afghan; basset, basset hound; beagle; bloodhound, sleuthhound; bluetick; black-and-tan
coonhound; Walker hound, Walker foxhound; English foxhound; redbone; borzoi, Russian wolfhound; Irish wolfhound; Italian greyhound;
whippet; Ibizan hound, Ibizan Podenco; Norwegian elkhound, elkhound; otterhound, otter hound; Saluki, gazelle hound; Scottish deerhound,
deerhound; Weimaraner; Staffordshire bullterrier, Staffordshire bull terrier; American Staffordshire terrier, Staffordshire terrier,
American pit bull terrier, pit bull terrier; Bedlington terrier; Border terrier; Kerry blue terrier; Irish terrier; Norfolk terrier;
Norwich terrier; Yorkshire terrier; wire-haired fox terrier; Lakeland terrier; Sealyham terrier, Sealyham; Airedale, Airedale terrier;
cairn, cairn terrier; Australian terrier; Dandie Dinmont, Dandie Dinmont terrier; Boston bull, Boston terrier; miniature schnauzer; giant
schnauzer; standard schnauzer; Scotch terrier, Scottish terrier, Scottie; Tibetan terrier, chrysanthemum dog; silky terrier, Sydney silky;
soft-coated wheaten terrier; West Highland white terrier; Lhasa, Lhasa apso; flat-coated retriever; curly-coated retriever; golden
retriever; Labrador retriever; Chesapeake Bay retriever; German short-haired pointer; vizsla, Hungarian pointer; English setter; Irish
setter, red setter; Gordon setter; Brittany spaniel; clumber, clumber spaniel; English springer, English springer spaniel; Welsh springer
spaniel; cocker spaniel, English cocker spaniel, cocker; Sussex spaniel; Irish water spaniel; kuvasz; schipperke; groenendael; malinois;
briard; kelpie; komondor; Old English sheepdog, bobtail; Shetland sheepdog, Shetland sheep dog, Shetland; collie; Border collie; Bouvier
des Flandres, Bouviers des Flandres; Rottweiler; German shepherd, German shepherd dog, German police dog, alsatian; Doberman, Doberman
pinscher; miniature pinscher; Greater Swiss Mountain dog; Bernese mountain dog; Appenzeller; EntleBucher; boxer; bull mastiff; Tibetan
mastiff; French bulldog; Great Dane; Saint Bernard, St Bernard; Eskimo dog, husky; malamute, malemute, Alaskan malamute; Siberian husky;
dalmatian, coach dog, carriage dog; affenpinscher, monkey pinscher, monkey dog; basenji; pug, pug-dog; Leonberg; Newfoundland,
Newfoundland dog; Great Pyrenees; Samoyed, Samoyede; Pomeranian; chow, chow chow; keeshond; Brabancon griffon; Pembroke, Pembroke Welsh
corgi; Cardigan, Cardigan Welsh corgi; toy poodle; miniature poodle; standard poodle; Mexican hairless; timber wolf, grey wolf, gray wolf,
Canis lupus; white wolf, Arctic wolf, Canis lupus tundrarum; red wolf, maned wolf, Canis rufus, Canis niger; coyote, prairie wolf, brush
wolf, Canis latrans; dingo, warrigal, warragal, Canis dingo; dhole, Cuon alpinus; African hunting dog, hyena dog, Cape hunting dog, Lycaon
pictus; hyena, hyaena; red fox, Vulpes vulpes; kit fox, Vulpes macrotis; Arctic fox, white fox, Alopex lagopus; grey fox, gray fox,
Urocyon cinereoargenteus; tabby, tabby cat; tiger cat; Persian cat; Siamese cat, Siamese; Egyptian cat; cougar, puma, catamount, mountain
lion, painter, panther, Felis concolor; lynx, catamount; leopard, Panthera pardus; snow leopard, ounce, Panthera uncia; jaguar, panther,
Panthera onca, Felis onca; lion, king of beasts, Panthera leo; tiger, Panthera tigris; cheetah, chetah, Acinonyx jubatus; brown bear,
bruin, Ursus arctos; American black bear, black bear, Ursus americanus, Euarctos americanus; ice bear, polar bear, Ursus Maritimus,
Thalarctos maritimus; sloth bear, Melursus ursinus, Ursus ursinus; mongoose; meerkat, mierkat; tiger beetle; ladybug, ladybeetle, lady
beetle, ladybird, ladybird beetle; ground beetle, carabid beetle; long-horned beetle, longicorn, longicorn beetle; leaf beetle,
chrysomelid; dung beetle; rhinoceros beetle; weevil; fly; bee; ant, emmet, pismire; grasshopper, hopper; cricket; walking stick,
walkingstick, stick insect; cockroach, roach; mantis, mantid; cicada, cicala; leafhopper; lacewing, lacewing fly; dragonfly, darning
needle, devil's darning needle, sewing needle, snake feeder, snake doctor, mosquito hawk, skeeter hawk; damselfly; admiral; ringlet,
ringlet butterfly; monarch, monarch butterfly, milkweed butterfly, Danaus plexippus; cabbage butterfly; sulphur butterfly, sulfur
butterfly; lycaenid, lycaenid butterfly; starfish, sea star; sea urchin; sea cucumber, holothurian; wood rabbit, cottontail, cottontail
rabbit; hare; Angora, Angora rabbit; hamster; porcupine, hedgehog; fox squirrel, eastern fox squirrel, Sciurus niger; marmot; beaver;
guinea pig, Cavia cobaya; sorrel; zebra; hog, pig, grunter, squealer, Sus scrofa; wild boar, boar, Sus scrofa; warthog; hippopotamus,
hippo, river horse, Hippopotamus amphibius; ox; water buffalo, water ox, Asiatic buffalo, Bubalus bubalis; bison; ram, tup; bighorn,
bighorn sheep, cimarron, Rocky Mountain bighorn, Rocky Mountain sheep, Ovis canadensis; ibex, Capra ibex; hartebeest; impala, Aepyceros
melampus; gazelle; Arabian camel, dromedary, Camelus dromedarius; llama; weasel; mink; polecat, fitch, foulmart, foumart, Mustela
putorius; black-footed ferret, ferret, Mustela nigripes; otter; skunk, polecat, wood pussy; badger; armadillo; three-toed sloth, ai,
Bradypus tridactylus; orangutan, orang, orangutang, Pongo pygmaeus; gorilla, Gorilla gorilla; chimpanzee, chimp, Pan troglodytes; gibbon,
Hylobates lar; siamang, Hylobates syndactylus, Symphalangus syndactylus; guenon, guenon monkey; patas, hussar monkey, Erythrocebus patas;
baboon; macaque; langur; colobus, colobus monkey; proboscis monkey, Nasalis larvatus; marmoset; capuchin, ringtail, Cebus capucinus;
howler monkey, howler; titi, titi monkey; spider monkey, Ateles geoffroyi; squirrel monkey, Saimiri sciureus; Madagascar cat, ring-tailed
lemur, Lemur catta; indri, indris, Indri indri, Indri brevicaudatus; Indian elephant, Elephas maximus; African elephant, Loxodonta
africana; lesser panda, red panda, panda, bear cat, cat bear, Ailurus fulgens; giant panda, panda, panda bear, coon bear, Ailuropoda
melanoleuca; barracouta, snoek; eel; coho, cohoe, coho salmon, blue jack, silver salmon, Oncorhynchus kisutch; rock beauty, Holocanthus
tricolor; anemone fish; sturgeon; gar, garfish, garpike, billfish, Lepisosteus osseus; lionfish; puffer, pufferfish, blowfish, globefish
""".split()).split("; ")


def with_article(noun):
    """"a cat", "an ant"."""
    return ("an " if noun[0] in "aeiouAEIOU" else "a ") + noun


PROMPT_SETS = {
    "common-animals": COMMON_ANIMALS,
    "imagenet-animals": IMAGENET_ANIMALS,
    "animal-activities": [f"{with_article(animal)} {activity}" for animal in COMMON_ANIMALS for activity in ACTIVITIES],
}


def load_prompts(name):
    """The prompts of a named set, or of a text file with one prompt a line -> list of str. Raises ValueError, one line."""
    if name in PROMPT_SETS:
        return list(PROMPT_SETS[name])
    try:
        text = Path(name).read_text(encoding="utf-8-sig")
    except OSError:
        raise ValueError(f"--prompts {name}: neither a file that can be read nor one of {', '.join(PROMPT_SETS)}") from None
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ValueError(f"--prompts {name}: not a text file in UTF-8")
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts {name}: no prompt in it; one prompt a line")
    return list(dict.fromkeys(prompts))


def draw_prompts(prompts, samples, repeats, rng):
    """The prompts of an epoch's samples. The paper draws each independently (repeats = 1); with repeats > 1, samples / repeats prompts are
    drawn, without repetition while there are enough, and taken `repeats` times each, so that per-prompt statistics mean something at once.

    rng: a numpy Generator -> list of `samples` str.
    """
    count = samples // repeats
    distinct = repeats > 1 and count <= len(prompts)
    return [prompts[i] for i in rng.choice(len(prompts), size=count, replace=not distinct) for _ in range(repeats)]


def spread_prompts(prompts, count):
    """`count` fixed prompts to evaluate on, spread over the whole set, or going round it -> list of str."""
    return [prompts[i * len(prompts) // count if len(prompts) > count else i % len(prompts)] for i in range(count)]
