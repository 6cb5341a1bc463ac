"""`python -m lora_cli`: the same as `lora`, for `accelerate launch -m`."""

from lora_cli.cli.app import main

if __name__ == "__main__":
    main()
