"""The models: what each can do, its weights and its LoRAs."""
