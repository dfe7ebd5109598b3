"""Rewards r(x_0, c): what the policy is trained to earn. Sec. 5 of the paper.

A reward is a function (images: uint8 numpy (B, H, W, 3), prompts: list of B str) -> scores (B,), or
-> (scores, {name: list of B}) where it has something to show. It must score each picture by itself,
for pictures come in batches. It is never differentiated, so it may be anything: the size of a file,
a regression on CLIP's embeddings, what a vision-language model says, or a function of your own:

    # mine.py                                  python train.py --reward mine.py:redness
    def redness(images, prompts):
        return images[..., 0].mean((1, 2)) - images[..., 1:].mean((1, 2, 3))

With a third parameter it also gets B dicts, its pictures' lines of --prompts FILE.jsonl.

What the text leaves open is the authors' code's: JPEG quality 95, sizes in kB of 1000 bytes, which
LAION predictor (sac+logos+ava1-l14-linearMSE) on which CLIP (ViT-L/14), BERTScore by DeBERTa (layer
40, no idf, no rescaling), pictures sent to LLaVA as JPEGs of quality 80. Deviations:

    what                           why                          effect
    BERTScore's reference is the   the paper's text; the code   other scores than the code's
    bare prompt                    has "The image contains ..."
    "washing dishes"               the paper's text; the code   45 prompts of 135 differ
                                   has "washing the dishes"
    pixels are rounded to uint8    the JAX code truncates       0.012 kB of 76
    CLIP sees pixels scaled once   their JAX code scales twice  other aesthetic scores than theirs
    LLaVA 1.5 7B; at least two     it fits one GPU; small       other descriptions than their 13B's
    tokens an answer               models may say nothing
    an empty answer scores 0       it covers nothing            no failure, the worst score
    LLaVA is asked the code's      --vlm-question; the text's   none known
    question                       "what is happening ...?"
"""

import base64
import copy
import importlib
import inspect
import io
import json
import os
import sys
import time
import urllib.request
import warnings
from collections.abc import Iterable, Mapping, Set
from contextlib import ExitStack, contextmanager
from functools import cache, partial, wraps
from multiprocessing.pool import ThreadPool
from numbers import Real
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from scheduler import UserError, one_line, refusing, require
from unet import loading, locate


def jpeg(image, quality):
    """The image as a JPEG file. uint8 (H, W, 3) -> bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def incompressibility(images, prompts):
    """Sec. 5.1: size as a JPEG of quality 95 in 1000 bytes. uint8 (B, H, W, 3) -> numpy (B,)."""
    return np.array([len(jpeg(image, 95)) / 1000 for image in images])


def compressibility(images, prompts):
    """Sec. 5.1: minus the size as a JPEG of quality 95, in kB. uint8 (B, H, W, 3) -> (B,)."""
    return -incompressibility(images, prompts)


class ClipEmbedder:
    """CLIP's image embeddings, of length 1. uint8 (B, H, W, 3) -> float32 (B, d) on the CPU."""

    def __init__(self, name, device):
        files = ["config.json", "preprocessor_config.json", "model.safetensors"]
        folder = locate(name, "--clip", files)
        self.processor = loading("--clip", name, transformers.CLIPImageProcessor, folder)
        cls = transformers.CLIPVisionModelWithProjection
        self.net = loading("--clip", name, cls, folder, dtype=torch.float32).to(device)

    @torch.no_grad()
    def __call__(self, images):
        parts = []
        for start in range(0, len(images), 64):
            pictures = [Image.fromarray(image) for image in images[start : start + 64]]
            pixels = self.processor(images=pictures, return_tensors="pt").pixel_values
            embeds = self.net(pixel_values=pixels.to(self.net.device)).image_embeds
            parts.append(F.normalize(embeds, dim=1).cpu())
        return torch.cat(parts)


clip_embedder = cache(ClipEmbedder)  # shared by the aesthetic reward and the diversity


class AestheticHead(nn.Module):
    """LAION's predictor, Sec. 5.2: linear layers with dropout, and nothing else, between them.

    CLIP embeddings of length 1, (B, d) -> scores (B,), about 1 to 10.
    """

    def __init__(self, d=768):
        super().__init__()
        layers = [nn.Linear(d, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2)]
        layers += [nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, embeds):
        return self.layers(embeds).squeeze(1)


def load_head(name, d):
    """An `AestheticHead` for d numbers from a file, a folder or a hub id. Raises UserError."""
    path = Path(name)
    if not path.is_file():
        folder = locate(name, "--aesthetic-head", ["model.safetensors", "aesthetic-model.pth"])
        path = next(folder.glob("model.safetensors"), folder / "aesthetic-model.pth")
    what = f"LAION's predictor (layers.0 .2 .4 .6 .7, weight and bias) on embeddings of {d} numbers"
    # a file of another kind may raise anything; of LAION's pickle only the tensors are read
    with refusing(f"--aesthetic-head {path} is not {what}", Exception):
        if path.suffix == ".safetensors":
            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        head = AestheticHead(d)
        head.load_state_dict(weights)
    return head.eval()


@torch.no_grad()
def aesthetic(images, prompts, clip, head):
    """Sec. 5.2: LAION's aesthetic score. uint8 (B, H, W, 3) -> float32 (B,)."""
    return head(clip(images)).numpy()


class Llava:
    """A LLaVA (transformers) that answers a question about each picture, in two tokens or more.

    images uint8 (B, H, W, 3), question -> list of B str.
    """

    def __init__(self, name, device, batch=16):
        folder = locate(name, "--vlm", ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"])
        self.processor = loading("--vlm", name, transformers.LlavaProcessor, folder)
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.float16
        cls = transformers.LlavaForConditionalGeneration
        self.net = loading("--vlm", name, cls, folder, dtype=dtype).to(device)
        self.batch = batch

    @torch.no_grad()
    def __call__(self, images, question):
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        text = self.processor.apply_chat_template([turn], add_generation_prompt=True)
        answers = []
        for start in range(0, len(images), self.batch):
            files = [jpeg(image, 80) for image in images[start : start + self.batch]]
            pictures = [Image.open(io.BytesIO(file)) for file in files]
            texts = [text] * len(pictures)
            inputs = self.processor(images=pictures, text=texts, return_tensors="pt")
            inputs = inputs.to(self.net.device, self.net.dtype)
            new = self.net.generate(**inputs, max_new_tokens=64, min_new_tokens=2, do_sample=False)
            new = new[:, inputs.input_ids.shape[1] :]
            answers += self.processor.batch_decode(new, skip_special_tokens=True)
        return [answer.strip() for answer in answers]


class ChatServer:
    """A vision-language model behind a server that speaks OpenAI's chat completions (vLLM, Ollama).

    images uint8 (B, H, W, 3), question -> list of B str, where an empty answer is an answer.
    `concurrency` requests at a time, each tried `tries` times with growing pauses where the server
    hangs, fails or answers nonsense. Raises UserError when it stays away. Its key is VLM_API_KEY.
    """

    timeout = 60.0  # seconds, for a request
    tries = 5
    pause = 1.0  # seconds after the first try; 2, 4 and 8 times as long after the next ones
    concurrency = 16

    def __init__(self, url, model):
        self.url = url.rstrip("/")
        needed = "must begin with http:// or https://, as http://localhost:8000/v1"
        require(self.url.startswith(("http://", "https://")), f"--vlm-url {url}: {needed}")
        self.key = os.environ.get("VLM_API_KEY", "").strip() or "none"
        listed = self.ask("models", lambda reply: [entry["id"] for entry in reply["data"]])
        self.model = model if model in listed or not listed else listed[0]

    def ask(self, path, read, body=None):
        """What `read` finds in the server's reply to a GET, or to a POST of `body`."""
        data = json.dumps(body).encode() if body else None
        # urllib's own User-Agent is turned away by many
        headers = {"Content-Type": "application/json", "User-Agent": "ddpo"}
        request = urllib.request.Request(f"{self.url}/{path}", data, headers)
        request.add_unredirected_header("Authorization", f"Bearer {self.key}")
        for attempt in range(self.tries):
            time.sleep(self.pause * 2 ** (attempt - 1) if attempt else 0)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    return read(json.load(reply))
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code} {one_line(error.read().decode(errors='replace'))}"
            except Exception as error:  # a server may cause many kinds, and all mean the same
                reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"--vlm-url {self.url}: {self.tries} tries of {path} failed: {reason}")

    def describe(self, question, image):
        """The model's answer to a question about one picture, uint8 (H, W, 3)."""
        data = base64.b64encode(jpeg(image, 80)).decode()
        picture = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}
        turns = [{"role": "user", "content": [picture, {"type": "text", "text": question}]}]
        body = {"model": self.model, "messages": turns, "max_tokens": 64, "temperature": 0}
        return self.ask("chat/completions", lambda r: r["choices"][0]["message"]["content"], body)

    def __call__(self, images, question):
        with ThreadPool(self.concurrency) as pool:  # a failure, or Ctrl-C, drops what is asked
            answers = list(pool.imap(partial(self.describe, question), images))
        answers = [(answer or "").strip() for answer in answers]
        if answers and not any(answers):
            why = "says nothing about any picture of a batch, which scores 0; can it see?"
            warnings.warn(f"--vlm-url {self.url}: {self.model} {why}")  # shown once
        return answers


def bert_score(candidates, references):
    """BERTScore (Zhang et al. 2020): each token's best match by cosine, averaged over a sentence.

        R = sum_j w_j max_i x_i . y_j / sum_j w_j         over the reference; P over the candidate
        F = 2 P R / (P + R)

    Two lots of sentences, each as token embeddings of length 1 (B, n, d), weights (B, n), 0 for
    special tokens, which may still be matched, and masks (B, n), True where there is a token
    -> P, R, F, each (B,); all 0 where a sentence is empty.
    """
    x, x_weights, x_mask = candidates
    y, y_weights, y_mask = references
    cosine = x @ y.mT  # (B, m, n)
    cosine = cosine.masked_fill(~(x_mask[:, :, None] & y_mask[:, None, :]), -2)
    P = (cosine.amax(2) * x_weights).sum(1) / x_weights.sum(1)
    R = (cosine.amax(1) * y_weights).sum(1) / y_weights.sum(1)
    empty = (x_weights.sum(1) == 0) | (y_weights.sum(1) == 0)
    P, R = P.masked_fill(empty, 0), R.masked_fill(empty, 0)
    return P, R, (2 * P * R / (P + R)).nan_to_num(0)


class BertScore:
    """BERTScore over layer `layer` of a transformers encoder, without idf and rescaling.

    Two lists of B str -> P, R, F, each numpy (B,). Raises UserError for a layer that isn't there.
    """

    def __init__(self, name, layer, device):
        folder = locate(name, "--bert", ["*.json", "*.txt", "*.safetensors", "*.bin", "*.model"])
        self.tokenizer = loading("--bert", name, transformers.AutoTokenizer, folder)
        cls = transformers.AutoModel
        self.net = loading("--bert", name, cls, folder, dtype=torch.float32).to(device)
        self.layer = layer
        layers = getattr(self.net.config, "num_hidden_layers", 0)
        require(0 < layer <= layers, f"--bert-layer {layer}: {name} has layers 1 to {layers}")

    def embed(self, sentences):
        """-> embeddings (B, n, d) of length 1, weights (B, n), mask (B, n)."""
        limit = min(self.tokenizer.model_max_length, self.net.config.max_position_embeddings)
        options = {"padding": True, "truncation": True, "return_special_tokens_mask": True}
        texts = [sentence.strip() for sentence in sentences]
        tokens = self.tokenizer(texts, max_length=limit, return_tensors="pt", **options)
        tokens = tokens.to(self.net.device)
        special = tokens.pop("special_tokens_mask").bool()
        mask = tokens.attention_mask.bool()
        hidden = self.net(**tokens, output_hidden_states=True).hidden_states[self.layer]
        return F.normalize(hidden.float(), dim=2), (mask & ~special).float(), mask

    @torch.no_grad()
    def __call__(self, candidates, references):
        parts = []
        for start in range(0, len(candidates), 64):
            x = self.embed(candidates[start : start + 64])
            y = self.embed(references[start : start + 64])
            parts.append(torch.stack(bert_score(x, y)).cpu())
        return torch.cat(parts, dim=1).numpy()


def alignment(images, prompts, describe, score, question):
    """Sec. 5.3: BERTScore's recall of the prompt in a description of the picture.

    describe(images, question) -> B str; score(candidates, references) -> P, R, F.
    uint8 (B, H, W, 3) -> float32 (B,), {"description": list of B str}.
    """
    descriptions = describe(images, question)
    P, R, F1 = score(descriptions, prompts)
    return R, {"description": descriptions}


def diversity(embeds, prompts):
    """How much pictures of one prompt differ: 1 - cosine, over all pairs that share a prompt.

    CLIP embeddings of length 1, numpy (B, d) -> float; None where no prompt has two pictures.
    """
    embeds = torch.as_tensor(embeds)
    index = torch.tensor([prompts.index(prompt) for prompt in prompts])
    pairs = (index[:, None] == index) & ~torch.eye(len(prompts), dtype=torch.bool)
    if not pairs.any():
        return None
    return (1 - embeds @ embeds.T)[pairs].mean().item()


def make_aesthetic(settings, device):
    """`aesthetic` with its models, CLIP on `device`. Raises UserError."""
    clip = clip_embedder(settings.clip, device)
    head = load_head(settings.aesthetic_head, clip.net.config.projection_dim)
    return partial(aesthetic, clip=clip, head=head)


def make_alignment(settings, device):
    """`alignment` with its models on `device`, or behind --vlm-url. Raises UserError."""
    hint = "leave <image> out, the picture goes in by itself"
    require("<image>" not in settings.vlm_question, f"--vlm-question: {hint}")
    score = BertScore(settings.bert, settings.bert_layer, device)
    url, vlm = settings.vlm_url, settings.vlm
    describe = ChatServer(url, vlm) if url else Llava(vlm, device)
    return partial(alignment, describe=describe, score=score, question=settings.vlm_question)


REWARDS = {  # name: maker(settings of train.py, device) -> reward
    "compressibility": lambda settings, device: compressibility,
    "incompressibility": lambda settings, device: incompressibility,
    "aesthetic": make_aesthetic,
    "alignment": make_alignment,
}


@contextmanager
def restored():
    """Run anybody's code: what it likely flips for the whole process is flipped back."""
    device = torch.get_default_device()
    with ExitStack() as back, torch.set_grad_enabled(torch.is_grad_enabled()), np.errstate():
        back.callback(os.chdir, os.getcwd())
        back.callback(torch.set_num_threads, torch.get_num_threads())
        back.callback(torch.set_default_dtype, torch.get_default_dtype())
        back.callback(torch.set_default_device, None if device.type == "cpu" else device)
        back.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        yield


def load_object(spec, flag, known):
    """What "file.py:name", the value of `flag`, names. Raises UserError; not for the file's errors.

    The file is imported as Python would, once, its folder last on sys.path. known: other values.
    """
    require(".py:" in spec, f"{flag} {spec}: neither {', '.join(known)} nor file.py:name")
    file, _, wanted = spec.rpartition(":")
    path = Path(file).resolve()
    require(path.is_file(), f"{flag} {spec}: there is no such file; needed: file.py:name")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    importlib.invalidate_caches()  # of folders: the file may be new in one
    with restored():
        module = importlib.import_module(path.stem)
    given = Path(getattr(module, "__file__", None) or "").resolve()
    require(given == path, f"{flag} {spec}: rename it, {path.stem} is another module's name")
    require(hasattr(module, wanted), f"{flag} {spec}: {path} defines no {wanted!r}")
    return getattr(module, wanted)


def make_reward(name, settings, device, flag="--reward", metadata=None):
    """One of `REWARDS`, its models on `device`, or "file.py:function". Raises UserError.

    settings: train.py's; flag: where the name was given; metadata: {prompt: its dict}.
    """
    if name in REWARDS:
        return REWARDS[name](settings, device)
    reward = load_object(name, flag, REWARDS)
    with refusing(f"{flag} {name}", TypeError, ValueError):  # no function, or one written in C
        third = [*inspect.signature(reward).parameters.values()][2:3]
    if all(p.kind >= p.VAR_POSITIONAL or p.default is not p.empty for p in third):
        return reward

    @wraps(reward)
    def informed(images, prompts):
        known = [{"prompt": p, **copy.deepcopy((metadata or {}).get(p, {}))} for p in prompts]
        return reward(images, prompts, known)

    return informed


def listed(values):
    """Anything that has an order, tensors and generators too, as a list; [] for all else."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes, Mapping, Set)):
        return []
    return [value.tolist() if hasattr(value, "tolist") else value for value in values]


def checked(reward, images, prompts):
    """A reward's scores, one finite number a picture, and what it shows beside them.

    uint8 (B, H, W, 3), B str -> float64 (B,), {name: list of B}. Raises UserError for an answer of
    another kind; an error inside the reward stays what it is.
    """
    B, shown = len(prompts), {}
    with restored():  # a generator's code runs in here too
        given = reward(images.copy(), list(prompts))
        if isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], Mapping):
            given, shown = given
        scores = listed(given)
        shown = {key: listed(values) for key, values in shown.items()}
    who = f"the reward {one_line(getattr(reward, '__name__', reward))} must"
    right = all(isinstance(x, Real) and abs(x) <= sys.float_info.max for x in scores)
    told = one_line(scores or given)
    said = f"{who} give one finite number for each of {B} pictures; it gave {told}"
    require(right and len(scores) == B, said)
    odd = [key for key, values in shown.items() if len(values) != B]
    require(not odd, f"{who} show one thing for each of {B} pictures as {odd}")
    return np.array(scores, dtype=np.float64), shown
