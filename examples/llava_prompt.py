"""Fewer image tokens in the prompt of a LLaVA-like model.

    python examples/llava_prompt.py
    python examples/llava_prompt.py photo.jpg --model llava-hf/llava-1.5-7b-hf --keep 0.25

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

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", nargs="?")
    parser.add_argument("--model")
    parser.add_argument("--keep", type=float, default=0.25, help="share of the image tokens in the prompt")
    args = parser.parse_args()
    picture = Image.open(args.image) if args.image else Image.fromarray(scenes.draw(1, seed=7).images[0])
    if args.model:
        processor = AutoProcessor.from_pretrained(args.model)
        model = AutoModelForImageTextToText.from_pretrained(args.model).eval()
        content = [{"type": "image"}, {"type": "text", "text": "What is in this picture?"}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=picture.convert("RGB"), text=text, return_tensors="pt")
    else:
        vision, text = CLIPVisionConfig(**SMALL, image_size=64, patch_size=8), LlamaConfig(**SMALL, vocab_size=200)
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=199)
        processor, model = None, AutoModelForImageTextToText.from_config(config).eval()
        pixels = torch.tensor(list(picture.convert("RGB").resize((64, 64)).tobytes())).view(1, 64, 64, 3)
        ids = torch.tensor([[1, 5, *[199] * 64, 7, 8]])
        inputs = {"input_ids": ids, "pixel_values": pixels.movedim(3, 1) / 127.5 - 1}

    generate(model, processor, inputs, "all")
    ck.patch(model, ck.Select(keep=args.keep), hand_over=True)
    generate(model, processor, inputs, f"{args.keep:.0%} of the")


@torch.no_grad()
def generate(model: torch.nn.Module, processor: object, inputs: dict, share: str) -> None:
    start = time.perf_counter()
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False, return_dict_in_generate=True)
    seconds, new = time.perf_counter() - start, output.sequences[0, inputs["input_ids"].shape[1] :]
    tokens = output.get("cache", output.get("past_key_values")).get_seq_length() + 1 - len(new)
    answer = processor.decode(new, skip_special_tokens=True) if processor else new.tolist()
    print(f"{share} image tokens: a prompt of {tokens} tokens, {seconds:.2f} s: {answer}")


if __name__ == "__main__":
    main()
