"""Fewer image tokens in the prompt of a LLaVA-like model.

    python examples/llava_prompt.py
    python examples/llava_prompt.py photo.jpg --model llava-hf/llava-1.5-7b-hf --keep 0.25 --question "Describe it."

Without arguments a small LLaVA with random weights sees a picture that is drawn here: its answer means nothing, the
numbers of tokens are right. --model is a folder or a name on the hub, which is downloaded.
"""

import argparse
import time

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig

import clipkernels as ck
from clipkernels.data import scenes
from clipkernels.images import Reader

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 4}
SLOT = 199


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", nargs="?")
    parser.add_argument("--model", help="a folder, or a name on the hub")
    parser.add_argument("--keep", type=float, default=0.25, help="share of the image tokens in the prompt")
    parser.add_argument("--question", default="What is in this picture?")
    parser.add_argument("--tokens", type=int, default=16, help="tokens to generate")
    arguments = parser.parse_args()

    picture = Reader().read(arguments.image) if arguments.image else Image.fromarray(scenes.draw(1, seed=7).images[0])
    if arguments.model:
        processor = AutoProcessor.from_pretrained(arguments.model)
        model = AutoModelForImageTextToText.from_pretrained(arguments.model).eval()
        content = [{"type": "image"}, {"type": "text", "text": arguments.question}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=picture, text=prompt, return_tensors="pt")
    else:
        processor, model, inputs = None, small(), small_inputs(picture)

    generate(model, processor, inputs, arguments.tokens, "all")
    ck.patch(model, ck.Select(keep=arguments.keep), hand_over=True)
    generate(model, processor, inputs, arguments.tokens, f"{arguments.keep:.0%} of the")
    ck.unpatch(model)


def small() -> torch.nn.Module:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**SMALL, image_size=64, patch_size=8)
    text = LlamaConfig(**SMALL, vocab_size=SLOT + 1, eos_token_id=None)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=SLOT)
    return AutoModelForImageTextToText.from_config(config).eval()


def small_inputs(picture: Image.Image) -> dict[str, torch.Tensor]:
    pixels = torch.tensor(list(picture.resize((64, 64)).tobytes())).view(1, 64, 64, 3).permute(0, 3, 1, 2) / 127.5 - 1
    return {"input_ids": torch.tensor([[1, 5, *[SLOT] * 64, 7, 8]]), "pixel_values": pixels}


@torch.no_grad()
def generate(model: torch.nn.Module, processor: object, inputs: dict, tokens: int, share: str) -> None:
    start = time.perf_counter()
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, return_dict_in_generate=True)
    seconds = time.perf_counter() - start
    new = output.sequences[0, inputs["input_ids"].shape[1] :]
    answer = processor.decode(new, skip_special_tokens=True) if processor else new.tolist()
    prompt = output.cache.get_seq_length() + 1 - len(new)
    print(f"{share} image tokens: a prompt of {prompt} tokens, {seconds:.2f} s: {answer}")


if __name__ == "__main__":
    main()
