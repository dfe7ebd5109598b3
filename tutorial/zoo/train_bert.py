"""Train the zoo's BERT: a small masked language model on captions; BERTScore compares with it.

    python tutorial/zoo/train_bert.py

As in BERT's own recipe some of the words asked for are left in their place, here more of them: in
captions all animals are interchangeable, and only so do their embeddings stay apart.

Prints its gate over captions of all 133 things on all ten grounds: the right one must score highest
against itself, and a wrong thing or colour must cost 0.05.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[2]))
import data
import loop
from rewards import BertScore

STEPS, BATCH, LAYER = 1000, 128, 2
WORDS = """
a an on background the of with and is in it picture image photo shows there blurry dull vivid flat
gradient striped checkered dotted cloudy
""".split()


def caption(rng):
    """A caption of a picture; now and then of one that the zoo cannot draw."""
    name, colour = data.random_name(rng), data.random_colour(rng)
    if rng.random() < 0.1:
        return f"{data.article(name)} {rng.choice(data.ACTIVITIES)}"
    words = [str(rng.choice(["blurry", "dull", "vivid"]))] if rng.random() < 0.2 else []
    subject = " ".join([*words, name])
    return data.article(subject) if rng.random() < 0.1 else data.on_ground(subject, colour)


def make_tokenizer(folder):
    """One token a word of the captions, and letters for all others."""
    letters = [chr(i) for i in range(97, 123)] + list("0123456789.,!?'-")
    words = [*data.NAMES, *data.COLOURS, *" ".join(data.ACTIVITIES).split(), *WORDS, *letters]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(words)]
    vocab += ["##" + letter for letter in letters]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n")
    return BertTokenizerFast(vocab={word: i for i, word in enumerate(vocab)}, model_max_length=32)


def gate(folder, layer=LAYER, count=40):
    """The figures that the design asks for, of `count` captions.

    -> the share that rank first among all, the least cost of a wrong thing, of a wrong colour.
    """
    score, rng = BertScore(str(folder), layer, "cpu"), np.random.default_rng(5)
    pairs = [(name, colour) for name in data.NAMES for colour in data.COLOURS]
    captions = [data.on_ground(*pair) for pair in pairs]
    first, things, colours = 0, [], []
    for i in rng.choice(len(pairs), count, replace=False):
        recall = score(captions, [captions[i]] * len(captions))[1]
        first += int(recall.argmax() == i)
        for j, (name, colour) in enumerate(pairs):
            if (name == pairs[i][0]) != (colour == pairs[i][1]):  # one of the two is wrong
                wrong = things if colour == pairs[i][1] else colours
                wrong.append(float(recall[i] - recall[j]))
    return first / count, min(things), min(colours)


def main():
    options = data.options(__doc__)
    folder, device = options.zoo / "bert", options.device
    torch.manual_seed(0)
    tokenizer = make_tokenizer(folder)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    net = BertForMaskedLM(config).to(device)

    def loss(net, rng):
        lines = [caption(rng) for _ in range(BATCH)]
        tokens = tokenizer(lines, padding=True, return_tensors="pt")
        shape = tokens.input_ids.shape
        asked = torch.as_tensor(rng.random(shape) < 0.4) & (tokens.input_ids > 4)
        hidden = asked & torch.as_tensor(rng.random(shape) < 0.4)
        ids = tokens.input_ids.masked_fill(hidden, tokenizer.mask_token_id).to(device)
        logits = net(input_ids=ids, attention_mask=tokens.attention_mask.to(device)).logits
        return F.cross_entropy(logits[asked.to(device)], tokens.input_ids[asked].to(device))

    steps, gentle = 2 if options.quick else STEPS, {"lr": 0.01, "adam_lr": 1e-3}
    net = loop.train("bert", net, loss, steps, options.zoo / ".data", every=500, **gentle)
    net.half().cpu().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for layer in (1, 2, 3):
        first, thing, colour = gate(folder, layer, 1 if options.quick else 40)
        print(
            f"layer {layer}: right first {first:.1%}; "
            f"a wrong thing costs at least {thing:.3f}, a wrong colour {colour:.3f}"
        )


if __name__ == "__main__":
    main()
