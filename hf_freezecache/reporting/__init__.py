"""What a training leaves for people to look at: its record as JSON, pictures, and a page of HTML."""
