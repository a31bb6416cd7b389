"""The agent's ends of the wire: its stream to the coordinator, and the Logs service for people."""
