"""Train a small latent diffusion model from scratch, as a base that adapters are then tried on.

usage: python scripts/pretrain/pretrain_diffusion.py DATA TO PICTURES [--minutes 4.4] [--batch 256]
       (to try it on a CPU: --steps 2 --batch 4 --pool 32 --width 32 --prompts 4 --inference 2)

DATA holds the folders mnist_test and omniglot. TO gets a StableDiffusionPipeline with fewer than 25
million parameters in bfloat16, in shards of at most 15 MB, and samples.png. It draws pictures of
64 x 64 pixels for captions such as "a large red 3 on a blue background" (`pictures.py`).
It takes less than five minutes on an H100: the autoencoder comes first, then text encoder and U-Net
together, on latents that are computed once.

PICTURES gets what the model has not seen, to adapt it to, each with train and validation, and a
caption beside each picture: style, object and character. Where PICTURES/classifier is there, which
`picture_classifier.py train` writes, it says at the end whether the model draws what is asked for.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name for it
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from picture_classifier import (
    answers,
    load_classifier,
    shares_right,
    shown,
)
from pictures import (
    CHARACTER,
    COLOURS,
    OBJECT,
    OWN_COLOURS,
    SIZE,
    Facts,
    Glyphs,
    save_grid,
    save_pictures,
)
from pretraining import SHARD, Schedule, Steps, computing_in, count_parameters, train_on_rows
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SPECIAL = ["<|startoftext|>", "<|endoftext|>"]
LONGEST = 32  # tokens of a caption, with those that begin and end it
KL_WEIGHT = 5e-5
UNSAID = 0.15  # of the captions say nothing of the background, and as many nothing of the colour
FILLED = 0.5  # of the pictures have a second colour
NO_CAPTION = 0.1  # of the pictures: what guidance compares with


def make_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """Return CLIP's tokenizer with a vocabulary in which each word of the captions is a token."""
    blank = CLIPTokenizer().backend_tokenizer
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    trainer = BpeTrainer(
        vocab_size=2000, min_frequency=1, end_of_word_suffix="</w>", special_tokens=SPECIAL,
        initial_alphabet=letters, show_progress=False,
    )  # fmt: skip
    learner.train_from_iterator(captions, trainer)
    merges = json.loads(learner.to_str())["model"]["merges"]
    vocabulary = learner.get_vocab()
    for letter in letters:  # so that other words, such as triggers, are spelt
        vocabulary.setdefault(f"{letter}</w>", len(vocabulary))
    return CLIPTokenizer(vocabulary, [tuple(merge) for merge in merges], model_max_length=LONGEST)


def build(tokenizer: CLIPTokenizer, args: argparse.Namespace) -> StableDiffusionPipeline:
    """Return the pipeline with random weights."""
    width, text_width = args.width, 3 * args.width // 2
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(width // 4, width // 2, width), layers_per_block=1, latent_channels=4,
        norm_num_groups=8, sample_size=SIZE,
    )  # fmt: skip
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=text_width, intermediate_size=4 * text_width,
            projection_dim=text_width, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=LONGEST, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=SIZE // 4, in_channels=4, out_channels=4, layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(width, 3 * width // 2, 2 * width), attention_head_dim=4,
        cross_attention_dim=text_width, norm_num_groups=16,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1,
        prediction_type=args.prediction,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def train_vae(
    vae: AutoencoderKL, glyphs: Glyphs, schedule: Schedule, args: argparse.Namespace
) -> None:
    """Train the autoencoder on pictures with patterns of all kinds."""
    parts = painted(glyphs, args.pool, varied=True)
    pixels = torch.cat([own.bfloat16() for _, own in parts])

    def loss_of(pictures: Tensor) -> Tensor:
        wanted = pictures.float()
        with computing_in(pictures.device.type):
            posterior = vae.encode(wanted).latent_dist
            restored = vae.decode(posterior.sample()).sample.float()
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        far = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return F.mse_loss(restored, wanted) + F.l1_loss(restored, wanted) + KL_WEIGHT * far

    steps = Steps(loss_of, list(vae.parameters()), decay=1e-4, record=args.graphs)
    train_on_rows("autoencoder", steps, schedule, args.batch // 2, pixels)
    vae.requires_grad_(False).eval()


def painted(
    glyphs: Glyphs, count: int, *, varied: bool = False, held_out: bool = False
) -> Iterator[tuple[Facts, Tensor]]:
    """Yield facts and pictures of known things, some thousands at a time."""
    for start in range(0, count, 2048):
        facts = glyphs.sample(min(2048, count - start), glyphs.known, filled=FILLED)
        yield facts, glyphs.paint(facts, varied=varied, held_out=held_out)


@torch.no_grad()
def make_latents(
    parts: StableDiffusionPipeline, glyphs: Glyphs, count: int
) -> tuple[Tensor, Tensor]:
    """Return scaled latents (N, 4, 16, 16) and the captions' tokens (N, 32) of new pictures."""
    latents, captions = [], []
    for facts, pixels in painted(glyphs, count):
        with computing_in(pixels.device.type):
            latents.append(parts.vae.encode(pixels).latent_dist.mean.float())
        captions += facts.captions(glyphs.names, UNSAID)
    found = torch.cat(latents)
    parts.vae.register_to_config(scaling_factor=1 / float(found.std()))
    tokens = tokens_of(parts.tokenizer, captions).to(found.device)
    return found * parts.vae.config.scaling_factor, tokens


def tokens_of(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Return captions as tokens (N, 32)."""
    found = tokenizer(captions, padding="max_length", truncation=True, max_length=LONGEST)
    return torch.tensor(found["input_ids"])


def train_unet(
    parts: StableDiffusionPipeline,
    glyphs: Glyphs,
    args: argparse.Namespace,
    until: Callable[[float, float], Schedule],
) -> None:
    """Train text encoder and U-Net together until the time is over."""
    unet, text_encoder = parts.unet, parts.text_encoder
    latents, tokens = make_latents(parts, glyphs, 2 * args.pool)
    print(f"{len(latents):,} latents, scaled by {parts.vae.config.scaling_factor:.3f}", flush=True)
    schedule = until(1.0, args.rate)
    kept = parts.scheduler.alphas_cumprod.to(latents.device)
    empty = tokens_of(parts.tokenizer, [""]).to(latents.device)
    predicts_noise = args.prediction == "epsilon"

    def loss_of(clean: Tensor, captions: Tensor) -> Tensor:
        device = clean.device
        unsaid = torch.rand(len(clean), 1, device=device) < NO_CAPTION
        time_steps = torch.randint(len(kept), (len(clean),), device=device)
        noise = torch.randn_like(clean)
        signal = kept[time_steps][:, None, None, None]
        noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
        velocity = signal.sqrt() * noise - (1 - signal).sqrt() * clean
        with computing_in(device.type):
            states = text_encoder(torch.where(unsaid, empty, captions))[0]
            found = unet(noisy, time_steps, states).sample
        return F.mse_loss(found.float(), noise if predicts_noise else velocity)

    parameters = [*unet.parameters(), *text_encoder.parameters()]
    unet.train()
    text_encoder.train()
    steps = Steps(loss_of, parameters, betas=(0.9, 0.99), record=args.graphs)
    train_on_rows("U-Net", steps, schedule, args.batch, latents, tokens)
    unet.eval()
    text_encoder.eval()


@torch.no_grad()
def draw(parts: StableDiffusionPipeline, captions: list[str], args: argparse.Namespace) -> Tensor:
    """Return pictures (N, 3, 64, 64) in -1..1 that the model draws for some captions."""
    found = []
    for start in range(0, len(captions), 128):
        drawn = parts(
            captions[start : start + 128], num_inference_steps=args.inference,
            guidance_scale=args.guidance, output_type="pt",
            generator=torch.Generator().manual_seed(args.seed + start),
        ).images  # fmt: skip
        found.append(drawn.float().cpu() * 2 - 1)
    return torch.cat(found)


def write_sets(data: Path, folder: Path) -> None:
    """Write pictures of the style, the object and the character that the model does not know.

    They are painted on the CPU, so that they are the same on every machine.
    """
    torch.manual_seed(1)
    glyphs = Glyphs(data, "cpu")
    numbers = {"style": (128, 48), "object": (16, 16), "character": (36, 24)}
    for name, counts in numbers.items():
        things = {"style": glyphs.known, "object": [OBJECT], "character": [CHARACTER]}[name]
        for split, count in zip(("train", "validation"), counts, strict=True):
            facts = glyphs.sample(4 * count, things, styled=float(name == "style"))
            if name == "object":  # of which a background of its own colours would hide a half
                own = torch.tensor([list(COLOURS).index(colour) for colour in OWN_COLOURS])
                facts = facts[~torch.isin(facts.background, own)]
            facts = facts[torch.arange(count)]
            pixels = glyphs.paint(facts, held_out=split == "validation")
            save_pictures(folder / name / split, pixels, facts.captions(glyphs.names))


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("data", "to", "pictures"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--minutes", type=float, default=4.4, help="until training ends")
    parser.add_argument("--vae-until", type=float, default=0.32, help="share of the time")
    parser.add_argument("--steps", type=int, help="of each part, at most")
    parser.add_argument("--batch", type=int, default=256, help="pictures of a step")
    parser.add_argument("--pool", type=int, default=65_536, help="different pictures, for the VAE")
    parser.add_argument("--width", type=int, default=128, help="channels of the U-Net")
    parser.add_argument("--rate", type=float, default=6e-4, help="the highest learning rate")
    parser.add_argument("--vae-rate", type=float, default=1e-3)
    parser.add_argument("--prediction", choices=["v_prediction", "epsilon"], default="v_prediction")
    parser.add_argument("--prompts", type=int, default=512, help="to measure the model with")
    parser.add_argument("--inference", type=int, default=30, help="steps to draw a picture")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--only-pictures", action="store_true", help="write the sets and stop")
    parser.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def finish(parts: StableDiffusionPipeline, folder: Path, device: str) -> None:
    """Save the pipeline in bfloat16, and let it compute with the numbers that are saved."""
    parts.to(torch.bfloat16)
    parts.save_pretrained(folder, max_shard_size=SHARD)
    parts.to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    parts.set_progress_bar_config(disable=True)


@torch.no_grad()
def measure(parts: StableDiffusionPipeline, glyphs: Glyphs, args: argparse.Namespace) -> None:
    """Print what the classifier sees in real, restored and drawn pictures, and save some."""
    facts, pixels = next(painted(glyphs, args.prompts, held_out=True))
    restored = parts.vae(pixels.to(parts.vae.dtype)).sample.float().clamp(-1, 1)
    noise = F.mse_loss(restored, pixels) / 4  # of values in 0..1
    print(f"autoencoder on new drawings: {float(-10 * noise.log10()):.1f} dB")
    captions = facts.captions(glyphs.names)
    drawn = draw(parts, captions, args)
    if (args.pictures / "classifier").exists():
        classifier = load_classifier(args.pictures / "classifier", glyphs.device)
        digits = [i for i, name in enumerate(facts.name.tolist()) if glyphs.names[name].isdigit()]
        for name, own in (("real", pixels), ("restored", restored), ("drawn", drawn)):
            right = shares_right(classifier, own, answers(facts))
            of_digits = shares_right(classifier, own[digits], answers(facts)[digits])
            print(f"{name}: {shown(right)}; of digits: {shown(of_digits)}", flush=True)
    else:
        print("drawn pictures are not measured: PICTURES/classifier is not there")
    rows = [drawn[:96], pixels[:32].cpu(), restored[:32].cpu()]
    save_grid(args.to / "samples.png", torch.cat(rows), 16)
    print("samples.png: 6 rows of drawn, 2 of real and 2 of restored pictures; it begins with:")
    print("\n".join(captions[:8]))


def main() -> None:
    """Train all parts, save them, measure what they draw, and write the sets to adapt to."""
    start, args = time.monotonic(), parse_arguments()
    write_sets(args.data, args.pictures)
    if args.only_pictures:
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    glyphs = Glyphs(args.data, device)
    examples = glyphs.sample(20_000, glyphs.known, filled=FILLED)
    tokenizer = make_tokenizer(examples.captions(glyphs.names))
    parts = build(tokenizer, args)
    own = [parts.vae, parts.text_encoder, parts.unet]
    for part in own:
        part.to(device)
    sizes = ", ".join(f"{count_parameters(part):,}" for part in own)
    print(f"{count_parameters(*own):,} parameters ({sizes}), {len(tokenizer)} tokens, on {device}")

    def until(share: float, rate: float) -> Schedule:
        return Schedule(share * 60 * args.minutes, args.steps, rate, 200, start)

    train_vae(parts.vae, glyphs, until(args.vae_until, args.vae_rate), args)
    train_unet(parts, glyphs, args, until)
    finish(parts, args.to, device)
    measure(parts, glyphs, args)
    print(f"{time.monotonic() - start:.0f} s in all")


if __name__ == "__main__":
    main()
