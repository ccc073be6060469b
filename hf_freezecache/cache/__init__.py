"""What is kept: codecs, the store on disk, its fingerprint, and how it is built."""
