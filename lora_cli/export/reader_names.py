"""The programs that adapters are exported for, for a command line that has not imported torch."""

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
"""The Hub's names of libraries that read other formats than PEFT's; llama.cpp has none."""
