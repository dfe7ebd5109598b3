"""Rewards r(x_0, c), the prompts they are earned on, and what to watch beside them. Sec. 5 of the paper; App. D for the details.

A reward is any function  (images: uint8 numpy (B, H, W, 3), prompts: list of B str) -> scores (B,), or -> (scores, {name: list of B}) where
it has something to show. It must score each picture by itself, for pictures come in batches. It is never differentiated, so it may be anything: the size of a file, a regression on CLIP's embeddings, the
agreement of a vision-language model's description with the prompt, or a function of your own:

    # mine.py                                               python train.py --reward mine.py:redness
    def redness(images, prompts):
        return images[..., 0].mean((1, 2)) - images[..., 1:].mean((1, 2, 3))

Deviations from the paper: prompts may repeat within an epoch (`draw_prompts` with repeats > 1), which the zoo's few samples need; BERTScore's
reference is the bare prompt, as in the paper's text, where the authors' code says "The image contains {prompt}".
"""
import base64
import http.client
import importlib.util
import io
import json
import os
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

STABLE_DIFFUSION = ["unet/config.json", "vae/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
                    "text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/*", "scheduler/*", "ddpo.json"]


def locate(model, flag="--model", files=STABLE_DIFFUSION):
    """The folder of a model: a local one as it is, a hub id (owner/name) through huggingface_hub, only `files`. Raises ValueError, one line."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(model, allow_patterns=files, etag_timeout=5))
    except Exception as error:                          # no network, no such model, no access: many types, one meaning
        raise ValueError(f"{flag} {model}: neither a folder nor to be had from the hub ({type(error).__name__}). Where there is a network: "
                         f"`hf download {model} --local-dir FOLDER`, then {flag} FOLDER") from None


def choose_device(name, flag="--device"):
    """auto: a CUDA GPU (under torchrun each process has its own), else the CPU. Raises ValueError, one line."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        return torch.zeros(1, device=f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{flag} {name}: {str(error).splitlines()[0]}") from None


def jpeg(image, quality):
    """The image as a JPEG file. uint8 (H, W, 3) -> bytes."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="JPEG", quality=quality)
    return file.getvalue()


def incompressibility(images, prompts):
    """Sec. 5.1: the size of the image as a JPEG of quality 95, in kB of 1000 bytes. uint8 (B, H, W, 3) -> (B,)."""
    return np.array([len(jpeg(image, 95)) / 1000 for image in images])


def compressibility(images, prompts):
    """Sec. 5.1: minus the size of the image as a JPEG of quality 95, in kB of 1000 bytes. uint8 (B, H, W, 3) -> (B,)."""
    return -incompressibility(images, prompts)


def loading(flag, name, cls, folder, **options):
    """cls.from_pretrained(folder), quietly, its many ways to fail made one line. Raises ValueError."""
    from transformers.utils import logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        if "dtype" not in options:                      # a tokenizer or a processor
            return cls.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        net, found = cls.from_pretrained(folder, local_files_only=True, trust_remote_code=False, output_loading_info=True, **options)
        if lost := [key for key in found["missing_keys"] if "pooler" not in key]:      # transformers would fill them with random numbers
            raise ValueError(f"its weights lack {len(lost)} tensors, such as {lost[0]}")
        return net.eval()
    except Exception as error:
        raise ValueError(f"{flag} {name}: no {cls.__name__} in it ({type(error).__name__}: {' '.join(str(error).split())[:160]})") from None


class ClipEmbedder:
    """CLIP's image embeddings, of length 1. images uint8 (B, H, W, 3) -> float32 (B, d) on the CPU."""

    def __init__(self, name, device):
        from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection
        folder = locate(name, "--clip", ["config.json", "preprocessor_config.json", "model.safetensors"])
        self.processor = loading("--clip", name, CLIPImageProcessor, folder)
        self.model = loading("--clip", name, CLIPVisionModelWithProjection, folder, dtype=torch.float32).to(device)

    @torch.no_grad()
    def __call__(self, images):
        parts = []
        for start in range(0, len(images), 64):
            pixels = self.processor(images=[Image.fromarray(image) for image in images[start:start + 64]], return_tensors="pt").pixel_values
            parts.append(F.normalize(self.model(pixel_values=pixels.to(self.model.device)).image_embeds, dim=1).cpu())
        return torch.cat(parts)


class AestheticHead(nn.Module):
    """Sec. 5.2: LAION's predictor v2 ("sac+logos+ava1-l14-linearMSE"): linear layers with dropout and nothing else between them.

    CLIP embeddings of length 1, (B, d) -> scores (B,), about 1 to 10.
    """

    def __init__(self, d=768):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(d, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64), nn.Dropout(0.1),
                                    nn.Linear(64, 16), nn.Linear(16, 1))

    def forward(self, embeds):
        return self.layers(embeds).squeeze(1)


def load_head(name):
    """An `AestheticHead` from a file, a folder or a hub id: safetensors, or LAION's pickle, read as tensors only. Raises ValueError, one line."""
    path = Path(name)
    if not path.is_file():
        folder = locate(name, "--aesthetic-head", ["model.safetensors", "aesthetic-model.pth"])
        path = next((p for p in (folder / "model.safetensors", folder / "aesthetic-model.pth") if p.is_file()), None)
        if path is None:
            raise ValueError(f"--aesthetic-head {name}: holds neither model.safetensors nor aesthetic-model.pth")
    try:
        weights = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
        head = AestheticHead(weights["layers.0.weight"].shape[1])
        head.load_state_dict({key: tensor.float() for key, tensor in weights.items()}, strict=True)
    except Exception as error:                          # whatever a file that is something else may raise; nothing in it has been run
        raise ValueError(f"--aesthetic-head {path} is not LAION's predictor (layers.0 .2 .4 .6 .7, weight and bias): "
                         f"{type(error).__name__} {' '.join(str(error).split())[:120]}") from None
    return head.eval()


def diversity(embeds, prompts):
    """How much pictures of one prompt differ: 1 - cosine of their CLIP embeddings, averaged over all pairs that share a prompt.

    embeds numpy (B, d), of length 1 -> float; None where no prompt has two pictures.
    """
    index, embeds = torch.tensor([prompts.index(p) for p in prompts]), torch.as_tensor(embeds)
    pairs = (index[:, None] == index) & ~torch.eye(len(prompts), dtype=torch.bool)
    return (1 - embeds @ embeds.T)[pairs].mean().item() if pairs.any() else None


class Llava:
    """A LLaVA (transformers) that answers a question about each picture, in two tokens or more. images uint8 (B, H, W, 3) -> list of B str."""

    def __init__(self, name, device, batch=16):
        from transformers import LlavaForConditionalGeneration, LlavaProcessor
        folder = locate(name, "--vlm", ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"])
        self.processor = loading("--vlm", name, LlavaProcessor, folder)
        self.processor.tokenizer.padding_side = "left"
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.float16
        self.model = loading("--vlm", name, LlavaForConditionalGeneration, folder, dtype=dtype).to(device)
        self.batch = batch

    @torch.no_grad()
    def __call__(self, images, question):
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text, answers = self.processor.apply_chat_template(turn, add_generation_prompt=True), []
        for start in range(0, len(images), self.batch):
            pictures = [Image.open(io.BytesIO(jpeg(image, 80))) for image in images[start:start + self.batch]]
            inputs = self.processor(images=pictures, text=[text] * len(pictures), return_tensors="pt").to(self.model.device, self.model.dtype)
            output = self.model.generate(**inputs, max_new_tokens=64, min_new_tokens=2, do_sample=False)
            answers += self.processor.batch_decode(output[:, inputs.input_ids.shape[1]:], skip_special_tokens=True)
        return [answer.strip() for answer in answers]


class ChatServer:
    """A vision-language model behind the OpenAI chat-completions API (vLLM, `transformers serve`, Ollama ...), asked about each picture.

    `concurrency` requests at a time, each tried `tries` times with a growing pause (1, 2, 4 ... s) where the server hangs, fails or answers
    nonsense. Raises ConnectionError, one line, when it stays away. An empty answer is an answer.
    """
    timeout, tries, concurrency, pause = 60, 5, 16, 1.0

    def __init__(self, url, model):
        self.url, self.over = url.rstrip("/"), threading.Event()
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"--vlm-url {url}: must begin with http:// or https://, such as http://localhost:8000/v1")
        served = self.ask("models", lambda reply: [entry["id"] for entry in reply["data"]])
        self.model = model if model in served or not served else served[0]          # some serve what they don't list

    def ask(self, path, read, body=None):
        """GET (or POST `body` to) url/path, and what `read` finds in the reply."""
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        reason = "another request failed"
        for attempt in range(self.tries):
            if self.over.wait(self.pause * 2 ** (attempt - 1) if attempt else 0):
                break
            try:
                request = urllib.request.Request(f"{self.url}/{path}", json.dumps(body).encode() if body else None, headers)
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    return read(json.loads(reply.read(2**20)))
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code} {' '.join(error.read(300).decode(errors='replace').split())}"
                if error.code < 500 and error.code not in (408, 429):       # our fault: asking again won't help
                    break
            except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError) as error:
                reason = f"{type(error).__name__} {' '.join(str(error).split())[:200]}"
        self.over.set()
        raise ConnectionError(f"--vlm-url {self.url}: no answer from {path} after {attempt + 1} tries; the last: {reason}")

    def describe(self, image, question):
        url = "data:image/jpeg;base64," + base64.b64encode(jpeg(image, 80)).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], "max_tokens": 64, "temperature": 0}
        return self.ask("chat/completions", lambda reply: (reply["choices"][0]["message"]["content"] or "").strip(), body)

    def __call__(self, images, question):
        self.over.clear()
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                return list(pool.map(lambda image: self.describe(image, question), images))
            finally:                                    # after a failure, or Ctrl-C, the rest is dropped, and no one waits to try again
                self.over.set()


def bert_score(candidates, references, candidate_weights, reference_weights, candidate_mask, reference_mask):
    """BERTScore (Zhang et al. 2020): each token's best match by cosine, averaged over the candidate (P) and over the reference (R).

        R = sum_j w_j max_i x_i . y_j / sum_j w_j        P likewise with x and y exchanged        F = 2 P R / (P + R)

    Token embeddings of length 1, x (B, m, d) and y (B, n, d); weights (B, m) and (B, n), 0 for special tokens, which may still be
    matched; masks True where there is a token -> P, R, F, each (B,); all 0 where a sentence is empty.
    """
    cosine = candidates @ references.mT                                                          # (B, m, n)
    cosine = cosine.masked_fill(~(candidate_mask[:, :, None] & reference_mask[:, None, :]), -2)
    P = (cosine.amax(2) * candidate_weights).sum(1) / candidate_weights.sum(1)
    R = (cosine.amax(1) * reference_weights).sum(1) / reference_weights.sum(1)
    empty = (candidate_weights.sum(1) == 0) | (reference_weights.sum(1) == 0)
    P, R = P.masked_fill(empty, 0), R.masked_fill(empty, 0)
    return P, R, (2 * P * R / (P + R)).nan_to_num(0)


class BertScore:
    """BERTScore over layer `layer` of a transformers encoder, without idf and rescaling. Two lists of B str -> P, R, F, each (B,)."""

    def __init__(self, name, layer, device):
        from transformers import AutoModel, AutoTokenizer
        folder = locate(name, "--bert", ["*.json", "*.txt", "*.safetensors", "*.bin", "*.model"])
        self.tokenizer = loading("--bert", name, AutoTokenizer, folder)
        self.model = loading("--bert", name, AutoModel, folder, dtype=torch.float32).to(device)
        self.layer, layers = layer, getattr(self.model.config, "num_hidden_layers", 0)
        if not 0 < layer <= layers:
            raise ValueError(f"--bert-layer {layer}: {name} has layers 1 to {layers}")

    def embed(self, sentences):
        """-> embeddings (B, m, d) of length 1, weights (B, m), mask (B, m)."""
        limit = min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)
        tokens = self.tokenizer([s.strip() for s in sentences], padding=True, truncation=True, max_length=limit, return_special_tokens_mask=True,
                                return_tensors="pt").to(self.model.device)
        special, mask = tokens.pop("special_tokens_mask").bool(), tokens.attention_mask.bool()
        hidden = self.model(**tokens, output_hidden_states=True).hidden_states[self.layer]
        return F.normalize(hidden.float(), dim=2), (mask & ~special).float(), mask

    @torch.no_grad()
    def __call__(self, candidates, references):
        parts = []
        for start in range(0, len(candidates), 64):
            (x, wx, mx), (y, wy, my) = (self.embed(texts[start:start + 64]) for texts in (candidates, references))
            parts.append(torch.stack(bert_score(x, y, wx, wy, mx, my)).cpu())
        return torch.cat(parts, dim=1).numpy()


clip_embedder = cache(ClipEmbedder)                     # shared by the aesthetic reward and the diversity


def checked(reward, images, prompts):
    """The rewards, one finite number a picture, and what the reward shows beside them; or ValueError -> float64 (B,), {name: list of B}."""
    given = reward(images, prompts)
    scores, shown = given if isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], dict) else (given, {})
    scores = np.asarray(scores.detach().cpu() if isinstance(scores, torch.Tensor) else scores, dtype=np.float64)
    if scores.shape != (len(prompts),) or not np.isfinite(scores).all() or any(len(values) != len(prompts) for values in shown.values()):
        raise ValueError(f"the reward {getattr(reward, '__name__', reward)} must give one finite number for each of {len(prompts)} pictures; it gave {scores}")
    return scores, shown


def make_reward(name, settings, device):
    """The reward that `name` names, its models loaded on `device`. `settings` has the model options of train.py. Raises ValueError, one line."""
    if name in REWARDS:
        return REWARDS[name](settings, device)
    file, _, function = name.rpartition(":")
    if not file.endswith(".py") or not Path(file).is_file():
        raise ValueError(f"--reward {name}: neither one of {', '.join(REWARDS)} nor a file.py:function that is there")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        reward = getattr(module, function)
    except (Exception, SystemExit) as error:            # it is the user's file: any
        raise ValueError(f"--reward {name}: {type(error).__name__}: {error}") from error
    if not callable(reward):
        raise ValueError(f"--reward {name}: {function} is not a function")
    return reward


def make_aesthetic(settings, device):
    """Sec. 5.2: the aesthetic score."""
    clip, head = clip_embedder(settings.clip, device), load_head(settings.aesthetic_head)
    if (d := head.layers[0].in_features) != clip.model.config.projection_dim:
        raise ValueError(f"--aesthetic-head {settings.aesthetic_head} wants embeddings of {d} numbers, --clip {settings.clip} gives "
                         f"{clip.model.config.projection_dim}")
    print(f"aesthetic score: {settings.aesthetic_head} on the image embeddings of {settings.clip}")

    @torch.no_grad()
    def aesthetic(images, prompts):
        return head(clip(images)).numpy()
    return aesthetic


def make_alignment(settings, device):
    """Sec. 5.3: BERTScore's recall of the prompt in what a vision-language model says of the picture."""
    score = BertScore(settings.bert, settings.bert_layer, device)
    if "<image>" in settings.vlm_question:
        raise ValueError(f"--vlm-question {settings.vlm_question!r}: leave <image> out, the picture goes in by itself")
    vlm = ChatServer(settings.vlm_url, settings.vlm) if settings.vlm_url else Llava(settings.vlm, device)
    print(f"alignment: described by {f'{vlm.model} at {vlm.url}' if settings.vlm_url else settings.vlm}, scored by {settings.bert}, layer {settings.bert_layer}")

    def alignment(images, prompts):
        descriptions = vlm(images, settings.vlm_question)
        return score(descriptions, prompts)[1], {"description": descriptions}
    return alignment


REWARDS = {"compressibility": lambda settings, device: compressibility, "incompressibility": lambda settings, device: incompressibility,
           "aesthetic": make_aesthetic, "alignment": make_alignment}

# The 45 common animals of Table D.6, for the aesthetic reward.
COMMON_ANIMALS = """
cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard beetle ant butterfly fish shark
whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig turkey fly llama camel bat gorilla hedgehog kangaroo
""".split()

ACTIVITIES = ["washing dishes", "riding a bike", "playing chess"]

# The first 398 classes of ImageNet, all of them animals, for the two JPEG rewards.
IMAGENET_ANIMALS = " ".join("""
tench, Tinca tinca; goldfish, Carassius auratus; great white shark, white shark, man-eater, man-eating shark, Carcharodon carcharias; tiger shark, Galeocerdo cuvieri; hammerhead, hammerhead shark; electric ray, crampfish, numbfish, torpedo; stingray; cock; hen; ostrich, Struthio camelus; brambling, Fringilla montifringilla; goldfinch, Carduelis carduelis; house finch, linnet, Carpodacus mexicanus; junco, snowbird; indigo bunting, indigo finch, indigo bird, Passerina cyanea; robin, American robin, Turdus migratorius; bulbul; jay; magpie; chickadee; water ouzel, dipper; kite; bald eagle, American eagle, Haliaeetus leucocephalus; vulture; great grey owl, great gray owl, Strix nebulosa; European fire salamander, Salamandra salamandra; common newt, Triturus vulgaris; eft; spotted salamander, Ambystoma maculatum; axolotl, mud puppy, Ambystoma mexicanum; bullfrog, Rana catesbeiana; tree frog, tree-frog; tailed frog, bell toad, ribbed toad, tailed toad, Ascaphus trui; loggerhead, loggerhead turtle, Caretta caretta; leatherback turtle, leatherback, leathery turtle, Dermochelys coriacea; mud turtle; terrapin; box turtle, box tortoise; banded gecko; common iguana, iguana, Iguana iguana; American chameleon, anole, Anolis carolinensis; whiptail, whiptail lizard; agama; frilled lizard, Chlamydosaurus kingi; alligator lizard; Gila monster, Heloderma suspectum; green lizard, Lacerta viridis; African chameleon, Chamaeleo chamaeleon; Komodo dragon, Komodo lizard, dragon lizard, giant lizard, Varanus komodoensis; African crocodile, Nile crocodile, Crocodylus niloticus; American alligator, Alligator mississipiensis; triceratops; thunder snake, worm snake, Carphophis amoenus; ringneck snake, ring-necked snake, ring snake; hognose snake, puff adder, sand viper; green snake, grass snake; king snake, kingsnake; garter snake, grass snake; water snake; vine snake; night snake, Hypsiglena
torquata; boa constrictor, Constrictor constrictor; rock python, rock snake, Python sebae; Indian cobra, Naja naja; green mamba; sea snake; horned viper, cerastes, sand viper, horned asp, Cerastes cornutus; diamondback, diamondback rattlesnake, Crotalus adamanteus; sidewinder, horned rattlesnake, Crotalus cerastes; trilobite; harvestman, daddy longlegs, Phalangium opilio; scorpion; black and gold garden spider, Argiope aurantia; barn spider, Araneus cavaticus; garden spider, Aranea diademata; black widow, Latrodectus mactans; tarantula; wolf spider, hunting spider; tick; centipede; black grouse; ptarmigan; ruffed grouse, partridge, Bonasa umbellus; prairie chicken, prairie grouse, prairie fowl; peacock; quail; partridge; African grey, African gray, Psittacus erithacus; macaw; sulphur-crested cockatoo, Kakatoe galerita, Cacatua galerita; lorikeet; coucal; bee eater; hornbill; hummingbird; jacamar; toucan; drake; red-breasted merganser, Mergus serrator; goose; black swan, Cygnus atratus; tusker; echidna, spiny anteater, anteater; platypus, duckbill, duckbilled platypus, duck-billed platypus, Ornithorhynchus anatinus; wallaby, brush kangaroo; koala, koala bear, kangaroo bear, native bear, Phascolarctos cinereus; wombat; jellyfish; sea anemone, anemone; brain coral; flatworm, platyhelminth; nematode, nematode worm, roundworm; conch; snail; slug; sea slug, nudibranch; chiton, coat-of-mail shell, sea cradle, polyplacophore; chambered nautilus, pearly nautilus, nautilus; Dungeness crab, Cancer magister; rock crab, Cancer irroratus; fiddler crab; king crab, Alaska crab, Alaskan king crab, Alaska king crab, Paralithodes camtschatica; American lobster, Northern lobster, Maine lobster, Homarus americanus; spiny lobster, langouste, rock lobster, crawfish, crayfish, sea crawfish; crayfish, crawfish, crawdad, crawdaddy; hermit crab; isopod; white stork, Ciconia ciconia; black
stork, Ciconia nigra; spoonbill; flamingo; little blue heron, Egretta caerulea; American egret, great white heron, Egretta albus; bittern; crane; limpkin, Aramus pictus; European gallinule, Porphyrio porphyrio; American coot, marsh hen, mud hen, water hen, Fulica americana; bustard; ruddy turnstone, Arenaria interpres; red-backed sandpiper, dunlin, Erolia alpina; redshank, Tringa totanus; dowitcher; oystercatcher, oyster catcher; pelican; king penguin, Aptenodytes patagonica; albatross, mollymawk; grey whale, gray whale, devilfish, Eschrichtius gibbosus, Eschrichtius robustus; killer whale, killer, orca, grampus, sea wolf, Orcinus orca; dugong, Dugong dugon; sea lion; Chihuahua; Japanese spaniel; Maltese dog, Maltese terrier, Maltese; Pekinese, Pekingese, Peke; Shih-Tzu; Blenheim spaniel; papillon; toy terrier; Rhodesian ridgeback; Afghan hound, Afghan; basset, basset hound; beagle; bloodhound, sleuthhound; bluetick; black-and-tan coonhound; Walker hound, Walker foxhound; English foxhound; redbone; borzoi, Russian wolfhound; Irish wolfhound; Italian greyhound; whippet; Ibizan hound, Ibizan Podenco; Norwegian elkhound, elkhound; otterhound, otter hound; Saluki, gazelle hound; Scottish deerhound, deerhound; Weimaraner; Staffordshire bullterrier, Staffordshire bull terrier; American Staffordshire terrier, Staffordshire terrier, American pit bull terrier, pit bull terrier; Bedlington terrier; Border terrier; Kerry blue terrier; Irish terrier; Norfolk terrier; Norwich terrier; Yorkshire terrier; wire-haired fox terrier; Lakeland terrier; Sealyham terrier, Sealyham; Airedale, Airedale terrier; cairn, cairn terrier; Australian terrier; Dandie Dinmont, Dandie Dinmont terrier; Boston bull, Boston terrier; miniature schnauzer; giant schnauzer; standard schnauzer; Scotch terrier, Scottish terrier, Scottie; Tibetan terrier, chrysanthemum dog; silky terrier, Sydney silky;
soft-coated wheaten terrier; West Highland white terrier; Lhasa, Lhasa apso; flat-coated retriever; curly-coated retriever; golden retriever; Labrador retriever; Chesapeake Bay retriever; German short-haired pointer; vizsla, Hungarian pointer; English setter; Irish setter, red setter; Gordon setter; Brittany spaniel; clumber, clumber spaniel; English springer, English springer spaniel; Welsh springer spaniel; cocker spaniel, English cocker spaniel, cocker; Sussex spaniel; Irish water spaniel; kuvasz; schipperke; groenendael; malinois; briard; kelpie; komondor; Old English sheepdog, bobtail; Shetland sheepdog, Shetland sheep dog, Shetland; collie; Border collie; Bouvier des Flandres, Bouviers des Flandres; Rottweiler; German shepherd, German shepherd dog, German police dog, alsatian; Doberman, Doberman pinscher; miniature pinscher; Greater Swiss Mountain dog; Bernese mountain dog; Appenzeller; EntleBucher; boxer; bull mastiff; Tibetan mastiff; French bulldog; Great Dane; Saint Bernard, St Bernard; Eskimo dog, husky; malamute, malemute, Alaskan malamute; Siberian husky; dalmatian, coach dog, carriage dog; affenpinscher, monkey pinscher, monkey dog; basenji; pug, pug-dog; Leonberg; Newfoundland, Newfoundland dog; Great Pyrenees; Samoyed, Samoyede; Pomeranian; chow, chow chow; keeshond; Brabancon griffon; Pembroke, Pembroke Welsh corgi; Cardigan, Cardigan Welsh corgi; toy poodle; miniature poodle; standard poodle; Mexican hairless; timber wolf, grey wolf, gray wolf, Canis lupus; white wolf, Arctic wolf, Canis lupus tundrarum; red wolf, maned wolf, Canis rufus, Canis niger; coyote, prairie wolf, brush wolf, Canis latrans; dingo, warrigal, warragal, Canis dingo; dhole, Cuon alpinus; African hunting dog, hyena dog, Cape hunting dog, Lycaon pictus; hyena, hyaena; red fox, Vulpes vulpes; kit fox, Vulpes macrotis; Arctic fox, white fox, Alopex lagopus; grey fox, gray fox,
Urocyon cinereoargenteus; tabby, tabby cat; tiger cat; Persian cat; Siamese cat, Siamese; Egyptian cat; cougar, puma, catamount, mountain lion, painter, panther, Felis concolor; lynx, catamount; leopard, Panthera pardus; snow leopard, ounce, Panthera uncia; jaguar, panther, Panthera onca, Felis onca; lion, king of beasts, Panthera leo; tiger, Panthera tigris; cheetah, chetah, Acinonyx jubatus; brown bear, bruin, Ursus arctos; American black bear, black bear, Ursus americanus, Euarctos americanus; ice bear, polar bear, Ursus Maritimus, Thalarctos maritimus; sloth bear, Melursus ursinus, Ursus ursinus; mongoose; meerkat, mierkat; tiger beetle; ladybug, ladybeetle, lady beetle, ladybird, ladybird beetle; ground beetle, carabid beetle; long-horned beetle, longicorn, longicorn beetle; leaf beetle, chrysomelid; dung beetle; rhinoceros beetle; weevil; fly; bee; ant, emmet, pismire; grasshopper, hopper; cricket; walking stick, walkingstick, stick insect; cockroach, roach; mantis, mantid; cicada, cicala; leafhopper; lacewing, lacewing fly; dragonfly, darning needle, devil's darning needle, sewing needle, snake feeder, snake doctor, mosquito hawk, skeeter hawk; damselfly; admiral; ringlet, ringlet butterfly; monarch, monarch butterfly, milkweed butterfly, Danaus plexippus; cabbage butterfly; sulphur butterfly, sulfur butterfly; lycaenid, lycaenid butterfly; starfish, sea star; sea urchin; sea cucumber, holothurian; wood rabbit, cottontail, cottontail rabbit; hare; Angora, Angora rabbit; hamster; porcupine, hedgehog; fox squirrel, eastern fox squirrel, Sciurus niger; marmot; beaver; guinea pig, Cavia cobaya; sorrel; zebra; hog, pig, grunter, squealer, Sus scrofa; wild boar, boar, Sus scrofa; warthog; hippopotamus, hippo, river horse, Hippopotamus amphibius; ox; water buffalo, water ox, Asiatic buffalo, Bubalus bubalis; bison; ram, tup; bighorn, bighorn sheep, cimarron, Rocky
Mountain bighorn, Rocky Mountain sheep, Ovis canadensis; ibex, Capra ibex; hartebeest; impala, Aepyceros melampus; gazelle; Arabian camel, dromedary, Camelus dromedarius; llama; weasel; mink; polecat, fitch, foulmart, foumart, Mustela putorius; black-footed ferret, ferret, Mustela nigripes; otter; skunk, polecat, wood pussy; badger; armadillo; three-toed sloth, ai, Bradypus tridactylus; orangutan, orang, orangutang, Pongo pygmaeus; gorilla, Gorilla gorilla; chimpanzee, chimp, Pan troglodytes; gibbon, Hylobates lar; siamang, Hylobates syndactylus, Symphalangus syndactylus; guenon, guenon monkey; patas, hussar monkey, Erythrocebus patas; baboon; macaque; langur; colobus, colobus monkey; proboscis monkey, Nasalis larvatus; marmoset; capuchin, ringtail, Cebus capucinus; howler monkey, howler; titi, titi monkey; spider monkey, Ateles geoffroyi; squirrel monkey, Saimiri sciureus; Madagascar cat, ring-tailed lemur, Lemur catta; indri, indris, Indri indri, Indri brevicaudatus; Indian elephant, Elephas maximus; African elephant, Loxodonta africana; lesser panda, red panda, panda, bear cat, cat bear, Ailurus fulgens; giant panda, panda, panda bear, coon bear, Ailuropoda melanoleuca; barracouta, snoek; eel; coho, cohoe, coho salmon, blue jack, silver salmon, Oncorhynchus kisutch; rock beauty, Holocanthus tricolor; anemone fish; sturgeon; gar, garfish, garpike, billfish, Lepisosteus osseus; lionfish; puffer, pufferfish, blowfish, globefish
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
