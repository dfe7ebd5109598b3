"""Train the zoo's LLaVA: CLIP's eyes, a projection, a small language model that says what is there.

    python tutorial/zoo/train_llava.py

Needs train_clip.py. Composites are the judge's (a little off their place, blurred, noisy: a
diffusion model's samples are), sent through JPEG as the reward sends them, from another stream of
random numbers. A picture of nothing gets "nothing on a red background".
"""

import io
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

sys.path.insert(0, str(Path(__file__).parents[2]))
import data
import loop
from rewards import Llava, jpeg
from train_clip import PROCESSOR
from train_judge import composite

STEPS, BATCH, PATCHES = 1700, 64, (data.SIZE // 8) ** 2
QUESTION = "what is in this picture?"
WORDS = """
a an on background nothing user assistant : ? what is in this picture the image answer concisely
going
""".split()
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
)


def example(rng, art):
    """-> pixels uint8 (64, 64, 3) as JPEG leaves them, answer."""
    name, colour = data.random_name(rng), data.random_colour(rng)
    if rng.random() < 0.08:
        kind = str(rng.choice(["flat", "striped", "checkered", "cloudy"]))
        pixels = data.draw_ground(rng, colour, kind)
        answer = f"nothing on {data.article(colour)} background"
    else:
        pixels = composite(rng, art, name, colour)
        answer = data.on_ground(name, colour)
    return np.asarray(Image.open(io.BytesIO(jpeg(pixels, 80)))), answer


def examples(rng, art, n):
    """-> pixels uint8 (n, 64, 64, 3), n answers."""
    pixels, answers = zip(*[example(rng, art) for _ in range(n)])
    return np.stack(pixels), answers


def make_processor():
    """One token a word, CLIP's pictures, and the chat's form."""
    special = ["<pad>", "<unk>", "<s>", "</s>", "<image>"]
    words = [*special, *dict.fromkeys([*data.NAMES, *data.COLOURS, *WORDS])]
    vocab = {word: i for i, word in enumerate(words)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=128,
    )
    return LlavaProcessor(
        CLIPImageProcessor(**PROCESSOR),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def make_model(tokenizer, clip):
    """A LLaVA whose eyes are those of the CLIPModel in the folder `clip`."""
    clip = CLIPModel.from_pretrained(clip, dtype=torch.float32)
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    config = LlavaConfig(
        vision_config=clip.config.vision_config,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=PATCHES,
    )
    net = LlavaForConditionalGeneration(config)
    own, prefix = clip.state_dict(), "vision_model."
    tower = net.model.vision_tower
    keys = {key: prefix + key.removeprefix(prefix) for key in tower.state_dict()}
    tower.load_state_dict({key: own[name] for key, name in keys.items()})
    return net


def question(processor):
    """The tokens before the answer (n,)."""
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    turn = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(turn, add_generation_prompt=True)
    blank = Image.new("RGB", (data.SIZE, data.SIZE))
    return processor(images=blank, text=prompt, return_tensors="pt").input_ids[0]


def answer_tokens(tokenizer, answers):
    """Each answer and its end, padded at the end. B str -> (B, m)."""
    texts = [f"{answer} </s>" for answer in answers]
    return tokenizer(
        texts,
        add_special_tokens=False,
        padding=True,
        padding_side="right",
        return_tensors="pt",
    ).input_ids


def main():
    options = data.options(__doc__)
    art, device, cache = data.load_art(options.zoo), options.device, options.zoo / ".data"
    torch.manual_seed(2000)
    processor = make_processor()
    net = make_model(processor.tokenizer, options.zoo / "clip").to(device)
    asked, size = question(processor).to(device), 16 if options.quick else BATCH

    def loss(net, rng):
        pixels, answers = examples(rng, art, size)
        told = answer_tokens(processor.tokenizer, answers).to(device)
        ids = torch.cat([asked.expand(size, -1), told], dim=1)
        logits = net(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=data.to_tensor(pixels, device).contiguous(),
        ).logits
        logits = logits[:, len(asked) - 1 : -1]
        return F.cross_entropy(logits.flatten(0, 1), told.flatten(), ignore_index=0)

    @torch.no_grad()
    def look(net, step):
        folder = cache / "llava"
        processor.save_pretrained(folder)
        net.save_pretrained(folder)
        pixels, answers = examples(np.random.default_rng(77), art, 16 if options.quick else 256)
        said = Llava(str(folder), device)(pixels, QUESTION)
        right = np.mean([a == b for a, b in zip(said, answers)])
        print(f"llava: right on {right:.1%} of held-out composites", flush=True)
        print("    says", said[:4], "of", answers[:4], flush=True)

    steps, gentle = 2 if options.quick else STEPS, {"lr": 0.01, "adam_lr": 1e-3}
    net = loop.train("llava", net, loss, steps, cache, every=400, look=look, **gentle)
    make_processor().save_pretrained(options.zoo / "llava")  # one that has not padded yet
    net.half().cpu().save_pretrained(options.zoo / "llava")


if __name__ == "__main__":
    main()
