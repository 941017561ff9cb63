"""BAHE: click prediction over long textual histories, with the lower half of the language model paid once."""
