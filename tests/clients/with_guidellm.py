"""guidellm: its benchmark, of chats and of completions."""
