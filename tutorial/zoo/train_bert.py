"""Train the zoo's BERT: a small masked language model on captions, whose embeddings BERTScore compares.

    python tutorial/zoo/train_bert.py

As in BERT's own recipe some of the words asked for are left in their place, here more of them: in captions all animals are interchangeable, and only
so do their embeddings stay apart.

Prints its gate over captions of all 133 things on all ten grounds: the right one must score highest against itself, and a wrong thing or colour must cost 0.05.
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
from rewards import ACTIVITIES, BertScore

FOLDER = data.HERE / "bert"
STEPS, BATCH, LAYER = 1000, 128, 2
WORDS = [*data.NAMES, *data.COLOURS, *dict.fromkeys(" ".join(ACTIVITIES).split()),
         *"a an on background the of with and is in it picture image photo shows there blurry dull vivid flat gradient striped checkered dotted cloudy".split()]


def caption(rng):
    """A caption of a picture; now and then of one that the zoo cannot draw."""
    name, colour = data.random_name(rng), str(rng.choice(list(data.COLOURS)))
    if rng.random() < 0.1:
        return f"{data.article(name)} {rng.choice(ACTIVITIES)}"
    words = [str(rng.choice(["blurry", "dull", "vivid"]))] if rng.random() < 0.2 else []
    subject = data.article(" ".join([*words, name]))
    return subject if rng.random() < 0.1 else f"{subject} on {data.article(colour)} background"


def make_tokenizer():
    letters = [chr(i) for i in range(97, 123)] + list("0123456789.,!?'-")
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys([*WORDS, *letters]), *("##" + letter for letter in letters)]
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "vocab.txt").write_text("\n".join(vocab) + "\n")
    return BertTokenizerFast(vocab={word: i for i, word in enumerate(vocab)}, model_max_length=32)


def gate(layer=LAYER):
    """The figures that the design asks for, over 40 captions -> share that rank first among all, least cost of a wrong thing, of a wrong colour."""
    score, rng = BertScore(str(FOLDER), layer, "cpu"), np.random.default_rng(5)
    captions = [(name, colour) for name in data.NAMES for colour in data.COLOURS]
    text = lambda name, colour: f"{data.article(name)} on {data.article(colour)} background"
    first, things, colours = 0, [], []
    for i in rng.choice(len(captions), 40, replace=False):
        recall = score([text(*pair) for pair in captions], [text(*captions[i])] * len(captions))[1]
        first += recall.argmax() == i
        things += [recall[i] - recall[j] for j, pair in enumerate(captions) if pair[1] == captions[i][1] and j != i]
        colours += [recall[i] - recall[j] for j, pair in enumerate(captions) if pair[0] == captions[i][0] and j != i]
    return first / 40, min(things), min(colours)


def main():
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    net = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256,
                                     max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))

    def loss(net, rng):
        tokens = tokenizer([caption(rng) for _ in range(BATCH)], padding=True, return_tensors="pt")
        asked = torch.as_tensor(rng.random(tokens.input_ids.shape) < 0.4) & (tokens.input_ids > 4)
        hidden = asked & torch.as_tensor(rng.random(tokens.input_ids.shape) < 0.4)
        ids = tokens.input_ids.masked_fill(hidden, tokenizer.mask_token_id)
        logits = net(input_ids=ids, attention_mask=tokens.attention_mask).logits
        return F.cross_entropy(logits[asked], tokens.input_ids[asked])

    net = loop.train("bert", net, loss, STEPS, lr=0.01, adam_lr=1e-3, every=500)
    net.half().save_pretrained(FOLDER)
    tokenizer.save_pretrained(FOLDER)
    for layer in (1, 2, 3):
        print("layer {}: right first {:.1%}; a wrong thing costs at least {:.3f}, a wrong colour {:.3f}".format(layer, *gate(layer)))


if __name__ == "__main__":
    main()
