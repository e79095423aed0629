"""The merged model: a Hugging Face folder with the base's shards."""
