"""From rows to examples: checked, encoded, cached, streamed, packed and planned into steps."""
