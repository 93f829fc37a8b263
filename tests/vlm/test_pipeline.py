"""The pipeline of transformers on a model whose prompts are shorter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

import clipkernels as ck
from tests.vlm.models import IMAGE, SIDE, build, transformers
from tests.vlm.test_generation import host_values, layer_lengths

pytestmark = pytest.mark.usefixtures("one_thread")
TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{{ '<image> ' if part.type == 'image' else part.text }}{% endfor %}{% endfor %}"
)


def processor() -> Any:
    """A processor of LLaVA: images of one size, and a tokenizer of one word per id."""
    vocabulary = {"<image>" if index == IMAGE else f"w{index}": index for index in range(200)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="w3"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", padding_side="left", additional_special_tokens=["<image>"]
    )
    images = transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


@torch.no_grad()
def test_a_pipeline_writes_what_the_masked_host_writes() -> None:
    model, reader = build("Llava"), processor()
    host = copy.deepcopy(model)
    pipe = transformers.pipeline("image-text-to-text", model=model, processor=reader)
    ck.patch(model, ck.Select(0.25), hand_over=True)
    image, texts = Image.radial_gradient("L").convert("RGB"), ("w5 w6 w7", "w9")
    picture = {"type": "image", "image": image}
    chats = [[{"role": "user", "content": [picture, {"type": "text", "text": text}]}] for text in texts]
    lengths = layer_lengths(model)
    answers = pipe(text=chats, max_new_tokens=6, do_sample=False, return_full_text=False, batch_size=2)
    assert lengths[0] == 16 + 3
    prompts = [f"<image> {text}" for text in texts]
    values = reader(images=[[image], [image]], text=prompts, padding=True, return_tensors="pt")
    expected, _ = host_values(host, model, dict(values))
    written = host.generate(**expected, max_new_tokens=6, do_sample=False)[:, values["input_ids"].shape[1] :]
    assert [answer[0]["generated_text"].split() for answer in answers] == [
        [f"w{index}" for index in row] for row in written.tolist()
    ]
