"""Train the zoo's CLIP (transformers' CLIPModel, contrastive loss) on truthful captions, with a tokenizer of its own.

    python tutorial/zoo/train_clip.py

Its text encoder is the diffusion model's, its image embeddings serve the aesthetic head and the diversity metric: as in the paper.
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
FOLDER = data.HERE / "clip"
ART = data.load_art()


def captions(n=30000):
    rng = np.random.default_rng(0)
    words = list(data.NAMES) * 50
    for _ in range(n):                                  # the same words as clip_example's captions, without drawing the pictures
        name, colour = data.random_name(rng), rng.choice(list(data.COLOURS))
        words.append(f"a blurry dull vivid an {name} on a flat gradient striped checkered dotted cloudy {colour} background")
    activities = ["washing dishes", "riding a bike", "playing chess"]
    return words + [f"{data.article(name)} {activity}" for name in data.ANIMALS for activity in activities]


def make_tokenizer():
    """A CLIPTokenizer whose byte-pair merges are learned from the zoo's captions, special tokens last as in CLIP's own vocabulary."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(r" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(captions(), trainers.BpeTrainer(vocab_size=1600, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False))
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in learned["merges"]]
    letters = sorted(alphabet)
    words = letters + [letter + "</w>" for letter in letters]
    words += list(dict.fromkeys(a + b for a, b in merges if a + b not in words)) + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {word: i for i, word in enumerate(words)}
    folder = data.CACHE / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=LENGTH,
                         pad_token="<|endoftext|>")


def make_model(tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    text = dict(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
                max_position_embeddings=LENGTH, projection_dim=128, bos_token_id=end - 1, eos_token_id=end, pad_token_id=end)
    vision = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, image_size=data.SIZE, patch_size=8,
                  projection_dim=128)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


MEAN, STD = [0.5] * 3, [0.5] * 3
PROCESSOR = dict(size={"shortest_edge": data.SIZE}, crop_size={"height": data.SIZE, "width": data.SIZE}, image_mean=MEAN, image_std=STD)


def examples(rng, tokenizer, n):
    drawn = [data.clip_example(rng, ART) for _ in range(n)]
    tokens = tokenizer([caption for _, caption in drawn], padding="max_length", truncation=True, return_tensors="pt")
    return data.to_tensor(np.stack([picture.pixels for picture, _ in drawn])), tokens, [caption for _, caption in drawn]


def contrastive_loss(logits, captions):
    """Cross-entropy both ways; pictures with the same caption are all right answers."""
    same = torch.tensor([[float(a == b) for b in captions] for a in captions])
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def main():
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    print(f"{len(tokenizer)} tokens; {tokenizer.tokenize('a kangaroo on a red background, washing dishes')}")
    net = make_model(tokenizer)

    def loss(net, rng):
        pixels, tokens, words = examples(rng, tokenizer, BATCH)
        return contrastive_loss(net(pixel_values=pixels, **tokens).logits_per_image, words)

    @torch.no_grad()
    def look(net, step):
        pixels, tokens, words = examples(np.random.default_rng(1), tokenizer, 256)
        best = net(pixel_values=pixels, **tokens).logits_per_image.argmax(1)
        print(f"clip: the right caption of 256 for {np.mean([words[i] == words[b] for i, b in enumerate(best)]):.1%} of held-out pictures", flush=True)

    net = loop.train("clip", net, loss, STEPS, look=look)
    net.half().save_pretrained(FOLDER)
    save_tokenizer(tokenizer, FOLDER)
    CLIPImageProcessor(**PROCESSOR).save_pretrained(FOLDER)
    save_text_encoder(net, tokenizer)


def save_text_encoder(net, tokenizer):
    """The text half once more, where a Stable Diffusion folder keeps it, under the published file's names: transformers before 5 knows no others, and would
    fill the network with random numbers."""
    folder = data.HERE / "stable-diffusion" / "text_encoder"
    weights = {k: v.half().contiguous() for k, v in net.state_dict().items() if k.startswith("text_model.")}
    CLIPTextModel(net.config.text_config).half().save_pretrained(folder)                # for the config.json
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(tokenizer, data.HERE / "stable-diffusion" / "tokenizer")


def save_tokenizer(tokenizer, folder):
    """In the layout of the published CLIP and Stable Diffusion: vocab.json and merges.txt."""
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.json").unlink()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(data.CACHE / "tokenizer" / name, folder / name)


if __name__ == "__main__":
    main()
