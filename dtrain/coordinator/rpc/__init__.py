"""The coordinator's side of the wire: streams of workers, requests of people. Nothing here decides."""
