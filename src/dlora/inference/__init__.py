"""Using an adapter: answers, chats, evaluation, an API."""
