"""Train the zoo's CLIP (contrastive loss) on truthful captions, with a tokenizer of its own.

    python tutorial/zoo/train_clip.py

Its text encoder is the diffusion model's, its image embeddings serve the aesthetic head and the
diversity metric: as in the paper.
"""

import json
import shutil

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer

import data
import loop

STEPS, BATCH, LENGTH = 1200, 96, 16
START, END = "<|startoftext|>", "<|endoftext|>"
PROCESSOR = {
    "size": {"shortest_edge": data.SIZE},
    "crop_size": {"height": data.SIZE, "width": data.SIZE},
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}


def captions(n=30_000):
    """Text to learn byte pairs from: the words of clip_example's captions, without its pictures."""
    rng = np.random.default_rng(0)
    lines = data.NAMES * 50
    for _ in range(n):
        name, colour = data.random_name(rng), data.random_colour(rng)
        ground = f"a flat gradient striped checkered dotted cloudy {colour} background"
        lines.append(f"a blurry dull vivid an {name} on {ground}")
    for name in data.ANIMALS:
        lines += [f"{data.article(name)} {activity}" for activity in data.ACTIVITIES]
    return lines


def make_tokenizer(folder):
    """A CLIPTokenizer whose byte pairs are learned from the zoo's captions.

    Special tokens are last, as in CLIP's own vocabulary. Leaves vocab.json and merges.txt.
    """
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    words = pre_tokenizers.Split(r" ", "removed")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1600,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(captions(), trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]

    tokens = sorted(alphabet) + [letter + "</w>" for letter in sorted(alphabet)]
    tokens += dict.fromkeys(a + b for a, b in merges if a + b not in tokens)
    tokens += [START, END]
    vocab, lines = folder / "vocab.json", folder / "merges.txt"
    folder.mkdir(parents=True, exist_ok=True)
    vocab.write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    lines.write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return CLIPTokenizer(
        vocab=str(vocab), merges=str(lines), model_max_length=LENGTH, pad_token=END
    )


def make_model(tokenizer):
    """A CLIPModel of width 128: three text layers, four vision layers."""
    end = tokenizer.convert_tokens_to_ids(END)
    both = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "projection_dim": 128,
    }
    text = {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 3,
        "max_position_embeddings": LENGTH,
        "bos_token_id": end - 1,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    vision = {"num_hidden_layers": 4, "image_size": data.SIZE, "patch_size": 8}
    config = CLIPConfig(
        text_config={**both, **text}, vision_config={**both, **vision}, projection_dim=128
    )
    return CLIPModel(config)


def examples(rng, art, n):
    """-> pictures (n, 3, 64, 64) in [-1, 1], n captions."""
    pictures, words = zip(*[data.clip_example(rng, art) for _ in range(n)])
    return data.to_tensor(np.stack([picture.pixels for picture in pictures])), words


def logits(net, tokenizer, pixels, words, device):
    """CLIP's similarity of each picture (B, 3, 64, 64) to each of B captions -> (B, B)."""
    tokens = tokenizer(words, padding="max_length", truncation=True, return_tensors="pt")
    return net(pixel_values=pixels.to(device), **tokens.to(device)).logits_per_image


def contrastive_loss(similarity, words):
    """Cross-entropy both ways; pictures with the same caption are all right answers.

    (B, B), B captions -> scalar.
    """
    same = torch.tensor([[float(a == b) for b in words] for a in words], device=similarity.device)
    target = same / same.sum(1, keepdim=True)
    both = F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)
    return both / 2


def save_tokenizer(tokenizer, source, folder):
    """In the layout of the published CLIP and Stable Diffusion: vocab.json and merges.txt."""
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.json").unlink()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(source / name, folder / name)


def save_text_encoder(net, folder):
    """The text half once more, where a Stable Diffusion folder keeps it.

    Under the published file's names: transformers before 5 knows no others, and would fill the
    network with random numbers. The config.json says float32: diffusers makes all else of that type
    where it is asked for none, and transformers what the config says.
    """
    weights = {
        key: value.half().contiguous()
        for key, value in net.state_dict().items()
        if key.startswith("text_model.")
    }
    CLIPTextModel(net.config.text_config).save_pretrained(folder)  # for the config.json
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def main():
    options = data.options(__doc__)
    cache, art = options.zoo / ".data", data.load_art(options.zoo)
    torch.manual_seed(0)
    tokenizer = make_tokenizer(cache / "tokenizer")
    shown = tokenizer.tokenize("a kangaroo on a red background, washing dishes")
    print(f"{len(tokenizer)} tokens; {shown}")
    net = make_model(tokenizer).to(options.device)
    size = 16 if options.quick else BATCH

    def loss(net, rng):
        pixels, words = examples(rng, art, size)
        return contrastive_loss(logits(net, tokenizer, pixels, words, options.device), words)

    @torch.no_grad()
    def look(net, step):
        pixels, words = examples(np.random.default_rng(1), art, 256)
        best = logits(net, tokenizer, pixels, words, options.device).argmax(1).tolist()
        right = np.mean([words[i] == words[j] for i, j in enumerate(best)])
        print(f"clip: the right caption of 256 for {right:.1%} of held-out pictures", flush=True)

    net = loop.train("clip", net, loss, 2 if options.quick else STEPS, cache, look=look)
    net = net.half().cpu()
    net.save_pretrained(options.zoo / "clip")
    CLIPImageProcessor(**PROCESSOR).save_pretrained(options.zoo / "clip")
    save_tokenizer(tokenizer, cache / "tokenizer", options.zoo / "clip")
    diffusion = options.zoo / "stable-diffusion"
    save_text_encoder(net, diffusion / "text_encoder")
    save_tokenizer(tokenizer, cache / "tokenizer", diffusion / "tokenizer")


if __name__ == "__main__":
    main()
