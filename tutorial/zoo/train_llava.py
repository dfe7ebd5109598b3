"""Train the zoo's LLaVA: CLIP's eyes, a projection and a small language model that says what a picture shows, and on which ground.

    python tutorial/zoo/train_llava.py

Needs train_clip.py. Composites are the judge's (a little off their place, blurred, noisy: a diffusion model's samples are), sent through JPEG
as the reward sends them, from another stream of random numbers. A picture of nothing gets "nothing on a red background".
"""
import io
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPImageProcessor, CLIPModel, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[2]))
import data
import loop
from rewards import Llava, jpeg
from train_clip import PROCESSOR
from train_judge import composite

FOLDER = data.HERE / "llava"
STEPS, BATCH, PATCHES = 1700, 64, (data.SIZE // 8) ** 2
QUESTION = "what is in this picture?"
TEMPLATE = ("{% for message in messages %}{{ message['role'] }} : {% for part in message['content'] %}{% if part['type'] == 'image' %}<image> "
            "{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant :{% endif %}")


def example(rng):
    """-> pixels uint8 (64, 64, 3) as JPEG leaves them, answer."""
    name, colour = data.random_name(rng), str(rng.choice(list(data.COLOURS)))
    if rng.random() < 0.08:
        name, pixels = "nothing", data.draw_ground(rng, colour, str(rng.choice(["flat", "striped", "checkered", "cloudy"]))).clip(0, 255).astype(np.uint8)
    else:
        pixels = composite(rng, name, colour)
    words = "nothing" if name == "nothing" else data.article(name)
    return np.asarray(Image.open(io.BytesIO(jpeg(pixels, 80)))), f"{words} on {data.article(colour)} background"


def make_processor():
    words = [*data.NAMES, *data.COLOURS, *"a an on background nothing user assistant : ? what is in this picture the image answer concisely going".split()]
    vocab = {word: i for i, word in enumerate(["<pad>", "<unk>", "<s>", "</s>", "<image>", *dict.fromkeys(words)])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
                                        extra_special_tokens={"image_token": "<image>"}, padding_side="left", model_max_length=128)
    return LlavaProcessor(CLIPImageProcessor(**PROCESSOR), tokenizer, patch_size=8, vision_feature_select_strategy="default",
                          image_token="<image>", num_additional_image_tokens=1, chat_template=TEMPLATE)


def make_model(tokenizer):
    clip = CLIPModel.from_pretrained(data.HERE / "clip", dtype=torch.float32)
    text = LlamaConfig(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=320, num_hidden_layers=2, num_attention_heads=4,
                       max_position_embeddings=128, pad_token_id=0, bos_token_id=2, eos_token_id=3)
    config = LlavaConfig(vision_config=clip.config.vision_config, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
                         vision_feature_layer=-1, vision_feature_select_strategy="default", image_seq_length=PATCHES)
    net = LlavaForConditionalGeneration(config)
    own = {key.removeprefix("vision_model."): value for key, value in clip.state_dict().items() if key.startswith("vision_model.")}
    tower = net.model.vision_tower
    tower.load_state_dict({key: own[key.removeprefix("vision_model.")] for key in tower.state_dict()})
    return net


def main():
    torch.manual_seed(2000)
    processor = make_processor()
    tokenizer = processor.tokenizer
    net = make_model(tokenizer)
    FOLDER.mkdir(exist_ok=True)
    processor.save_pretrained(FOLDER)
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    prompt = processor.apply_chat_template(turn, add_generation_prompt=True)
    asked = processor(images=Image.new("RGB", (64, 64)), text=prompt, return_tensors="pt").input_ids[0]

    def loss(net, rng):
        pixels, answers = zip(*(example(rng) for _ in range(BATCH)))
        told = tokenizer([f"{answer} </s>" for answer in answers], add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt").input_ids
        ids = torch.cat([asked.expand(BATCH, -1), told], dim=1)
        logits = net(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=data.to_tensor(np.stack(pixels)).contiguous()).logits
        return F.cross_entropy(logits[:, len(asked) - 1:-1].flatten(0, 1), told.flatten(), ignore_index=0)

    def look(net, step):
        net.save_pretrained(FOLDER)
        rng = np.random.default_rng(77)
        pixels, answers = zip(*(example(rng) for _ in range(256)))
        said = Llava(str(FOLDER), "cpu")(np.stack(pixels), QUESTION)
        print(f"llava: right on {np.mean([a == b for a, b in zip(said, answers)]):.1%} of held-out composites; says", said[:4], "of", answers[:4], flush=True)

    net = loop.train("llava", net, loss, STEPS, look=torch.no_grad()(look), lr=0.01, adam_lr=1e-3, every=400)
    net.half().save_pretrained(FOLDER)


if __name__ == "__main__":
    main()
