"""The programs that adapters can be exported for; the command line needs them without torch."""

READERS = {
    "peft": "PEFT and transformers: everything is kept as it is",
    "vllm": "vLLM: one scale and one rank, low-rank matrices only",
    "gguf": "llama.cpp: one GGUF file",
    "mlx": "mlx-lm on Apple computers: adapters.safetensors in its layout",
    "diffusers": "diffusers: pytorch_lora_weights.safetensors, for `load_lora_weights`",
    "kohya": "the format of kohya's scripts, for web interfaces that draw: lora.safetensors",
    "plain": "PEFT's format without patterns and rsLoRA, for any other reader (SGLang, TGI, LoRAX)",
}
LIBRARIES = {"mlx": "mlx", "diffusers": "diffusers", "kohya": "diffusers"}
"""The Hub's names of libraries that do not read PEFT's format; llama.cpp has no name there."""
