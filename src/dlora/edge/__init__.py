"""The edge half: a peft model whose decoder lives in the cloud."""
