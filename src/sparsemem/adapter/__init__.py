"""How a memory enters a Hugging Face model, as a PEFT method."""
