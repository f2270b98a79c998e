"""What a user names, found and read: models, processors, prompts, pictures."""
