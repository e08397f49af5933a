"""Images as inputs: files to pixels (`decode`), streams of images (`source`)."""
