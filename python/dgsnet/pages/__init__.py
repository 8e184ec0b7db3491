"""What all pages share: figures and the HTML around them."""
